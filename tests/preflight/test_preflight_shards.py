"""What the index says is compared with what lies there, in a folder and in a real bucket."""

import json
import shutil
import uuid

import pytest

from remote_shards import write_shards
from vlm_composer.config.data import DatasetConfig
from vlm_composer.outages import StoreError
from vlm_composer.preflight.shards import check_shards, check_sides, read_shards


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
        shards = read_shards(config.train_loader.dataset, 0)
        return check_shards(config, "train", shards, None, 0)

    return run


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
    assert "has sha1, xxh64; set one of those" in text


def test_fewer_samples_than_a_batch(put, check):
    dataset = put()
    (text,) = failures(check(dataset, global_train_batch_size=81))
    assert "80 samples are fewer than one batch of 81" in text
    assert not failures(check(dataset, global_train_batch_size=80))
    assert not failures(check(dataset, global_train_batch_size=81, loader={"drop_last": False}))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[]", "corrupt: it has no version and shards"),
        (b'{"version": 2, "sha', "corrupt: it is no JSON"),
        (b'{"version": 2, "shards": []}', "holds no shard"),
        (b'{"version": 2, "shards": [{"samples": 1}]}', "is not that of MDS shards"),
    ],
)
def test_an_index_that_is_none(put, folder, index, message):
    (folder / "index.json").write_bytes(index)
    with pytest.raises(ValueError, match=message):
        read_shards(DatasetConfig(**put()), 0)


def test_no_index_at_all(put, folder):
    (folder / "index.json").unlink()
    with pytest.raises((ValueError, StoreError), match=r"no index\.json|there is no such"):
        read_shards(DatasetConfig(**put()), 0)


@pytest.mark.s3
def test_a_bucket_that_is_not_there(s3_server, tmp_path):
    dataset = DatasetConfig(remote="s3://preflight-nowhere/train", local=str(tmp_path))
    with pytest.raises(StoreError, match=r"download s3://preflight-nowhere/train/index\.json: the"):
        read_shards(dataset, 0)


def test_sides_that_are_one(tiny_config, shards, tmp_path):
    def look(train, evaluation):
        sections = [
            {"dataset": {"remote": str(shards / side), "local": str(local)}, "num_workers": 0}
            for side, local in (train, evaluation)
        ]
        config = tiny_config(train_loader=sections[0], eval_loader=sections[1])
        read = [
            read_shards(loader.dataset, 0) for loader in (config.train_loader, config.eval_loader)
        ]
        return [(f.level, str(f)) for f in check_sides(config, *read)]

    one, two = tmp_path / "one", tmp_path / "two"
    assert look(("train", one), ("eval", two)) == []
    ((level, text),) = look(("train", one), ("train", two))
    assert level == "warning"
    assert "train and eval read the same shards" in text
    ((level, text),) = look(("eval", one), ("train", two))
    assert level == "warning"
    assert "eval has 40 samples and train 7" in text
    ((level, text),) = look(("train", one), ("eval", one))
    assert level == "failure"
    assert f"train and eval have the same cache, {one}" in text
