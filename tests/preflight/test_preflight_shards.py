"""What the index says is compared with what lies there, in a folder and in a real bucket."""

import json
import shutil
import uuid

import pytest

from mixtures import SHARES, mixed
from remote_shards import write_shards
from vlm_composer.config.data import StreamConfig
from vlm_composer.outages import StoreError
from vlm_composer.preflight.shards import check_side, check_sides, read_shards


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """80 samples in seven shards."""
    return write_shards(tmp_path_factory.mktemp("shards"), 80)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "shards")


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.s3)])
def put(request, folder, tmp_path):
    """Publishes `folder` as it is now, and returns the section of a yaml that reads it."""

    def publish():
        if request.param == "folder":
            return {"local": str(folder)}
        server, name = request.getfixturevalue("s3_server"), f"preflight-{uuid.uuid4().hex}"
        url = server.make_bucket(name)
        for path in folder.iterdir():
            server.client().put_object(Bucket=name, Key=f"t/{path.name}", Body=path.read_bytes())
        return {"remote": f"{url}/t", "local": str(tmp_path / "cache")}

    return publish


@pytest.fixture
def check(tiny_config):
    """Reads and checks a section as that of the training data."""

    def run(dataset, **changes):
        loader = {"dataset": dataset, "num_workers": 0} | changes.pop("loader", {})
        config = tiny_config(train_loader=loader, **changes)
        return check_side(config, "train", read(config.train_loader), None, 0)

    return run


def read(loader):
    return {key: read_shards(source, 0) for key, source in loader.sources.items()}


def failures(found):
    return [str(finding) for finding in found if finding.level == "failure"]


def test_shards_that_are_as_they_should_be(put, check, tmp_path):
    (found,) = check(put())
    assert found.level == "ok"
    assert found.text.startswith("train: 80 samples (images) in 7 shards of ")
    assert not (tmp_path / "cache").exists()


def test_shards_that_are_missing_are_counted_and_named(put, check, folder):
    for number in (1, 2, 4, 5):
        (folder / f"shard.00000.{number:05}.mds").unlink()
    (text,) = failures(check(put()))
    assert "4 of 7 shards are missing from" in text
    missing = ", ".join(f"shard.00000.0000{number}.mds" for number in (1, 2, 4))
    assert f": {missing} and 1 more; upload" in text


def test_a_shard_that_was_cut(put, check, folder):
    path = folder / "shard.00000.00003.mds"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    (text,) = failures(check(put()))
    assert f"{path.name} has {size - 7} bytes, the index says {size}; upload" in text


def test_shards_of_something_else(put, check, folder):
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard["column_names"][0] = "number"
    (folder / "index.json").write_text(json.dumps(index))
    (text,) = failures(check(put()))
    assert "number (" in text
    assert "id (str)" in text
    assert "python -m convert" in text


def test_a_hash_that_the_index_lacks(put, check):
    (text,) = failures(check(put() | {"validate_hash": "md5"}))
    assert "validate_hash: md5, but the index of" in text
    assert "has xxh64; set one of those" in text


def test_fewer_samples_than_a_batch(put, check):
    dataset = put()
    (text,) = failures(check(dataset, global_train_batch_size=81))
    assert "an epoch of 80 samples is less than one batch of 81" in text
    assert not failures(check(dataset, global_train_batch_size=80))
    assert not failures(check(dataset, global_train_batch_size=81, loader={"drop_last": False}))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[]", "damaged: it is not a JSON object"),
        (b'{"a": 1}', "damaged: it has no version and shards"),
        (b'{"version": 2, "sha', "damaged: it is not JSON"),
        (b'{"version": 2, "shards": []}', "it names no shards"),
        (b'{"version": 2, "shards": [{"samples": 1}]}', "shard 0: column_names is None, not a"),
    ],
)
def test_an_index_that_is_none(put, folder, index, message):
    (folder / "index.json").write_bytes(index)
    with pytest.raises(ValueError, match=message):
        read_shards(StreamConfig(**put()), 0)


def test_no_index_at_all(put, folder):
    (folder / "index.json").unlink()
    with pytest.raises((ValueError, StoreError), match=r"no index\.json|there is no such"):
        read_shards(StreamConfig(**put()), 0)


@pytest.mark.s3
def test_a_bucket_that_is_not_there(s3_server, tmp_path):
    dataset = StreamConfig(remote="s3://preflight-nowhere/train", local=str(tmp_path))
    with pytest.raises(StoreError, match=r"download s3://preflight-nowhere/train/index\.json: the"):
        read_shards(dataset, 0)


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.s3)])
def put_two(request, two_sets, tmp_path):
    """Publishes copies of both sets; returns a function that gives the streams of a yaml, and the
    folder that may be changed before."""
    copy = shutil.copytree(two_sets, tmp_path / "two_sets")

    def publish(weights):
        section = mixed(copy, weights, caches=tmp_path / "caches")
        if request.param == "bucket":
            server, bucket = request.getfixturevalue("s3_server"), f"two-{uuid.uuid4().hex}"
            url = server.make_bucket(bucket)
            for path in copy.glob("*/train/*"):
                key = path.relative_to(copy).as_posix()
                server.client().put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
            for name, stream in section["streams"].items():
                stream["remote"] = f"{url}/{name}/train"
        return section

    return publish, copy


def test_every_stream_is_compared_with_its_index(put_two, check, tmp_path):
    publish, folder = put_two
    emoji, llava, mix = check({}, loader=publish(SHARES))
    assert {finding.level for finding in (emoji, llava, mix)} == {"ok"}
    assert emoji.text.startswith("train: 20 samples (images) in ")
    assert llava.text.startswith("train: 40 samples (images) in ")
    assert mix.text.startswith("train: an epoch of 60 samples takes 45 of streams.emoji (20, each")
    missing = sorted((folder / "llava" / "train").glob("*.mds"))[1]
    missing.unlink()
    (text,) = failures(check({}, loader=publish(SHARES)))
    assert "train: 1 of " in text
    assert f"/llava/train: {missing.name}; upload" in text
    assert not (tmp_path / "caches").exists()


def test_an_epoch_of_streams_that_is_none(two_sets, check):
    rare = {"emoji": {"proportion": 1e-3}, "llava": {"proportion": 1}}
    loader = mixed(two_sets, rare, epoch_size=7)
    texts = failures(check({}, loader=loader))
    assert texts == [
        "train_loader.streams.emoji: an epoch of 7 samples takes none of it; give it more, or "
        "leave it out",
        "train_loader: an epoch of 7 samples is less than one batch of 8 "
        "(global_train_batch_size); set 7 or less, or drop_last: false",
    ]


def test_a_stream_that_is_evaluated_too(tiny_config, two_sets):
    train = mixed(two_sets, SHARES)
    evaluation = mixed(two_sets, {"llava": {}})
    config = tiny_config(train_loader=train, eval_loader=evaluation)
    (found,) = check_sides(read(config.train_loader), read(config.eval_loader))
    place = two_sets / "llava" / "train"
    assert f"train and eval read the same shards ({place}, {place})" in found.text


def test_sides_that_are_one(tiny_config, shards, tmp_path):
    def look(train, evaluation):
        sections = [
            {"dataset": {"remote": str(shards / side), "local": str(local)}, "num_workers": 0}
            for side, local in (train, evaluation)
        ]
        config = tiny_config(train_loader=sections[0], eval_loader=sections[1])
        sides = (read(config.train_loader), read(config.eval_loader))
        return [(f.level, str(f)) for f in check_sides(*sides)]

    one, two = tmp_path / "one", tmp_path / "two"
    assert look(("train", one), ("eval", two)) == []
    ((level, text),) = look(("train", one), ("train", two))
    assert level == "warning"
    assert "train and eval read the same shards" in text
    ((level, text),) = look(("eval", one), ("train", two))
    assert level == "warning"
    assert "eval has 40 samples and train 7" in text
