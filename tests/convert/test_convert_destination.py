"""What a conversion writes, to a folder and to a real S3 server, and what it leaves alone."""

import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert import ConversionError
from convert.destination import Folder
from vlm_composer.locks import user_folder
from vlm_composer.storage import S3Store

SMALL = {"eval_ratio": 0.2, "size_limit": 1 << 12}  # bytes: three samples to a shard


def shards_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "index.json").read_text())["shards"]


def test_samples_read_back_as_they_were(pairs: Any) -> None:
    pairs.add(30)
    summary = pairs.convert(**SMALL)
    assert (summary.train, summary.eval) == (24, 6)
    samples = {side: pairs.read(side) for side in ("train", "eval")}
    by_id = {item["id"]: item for item in pairs.items}
    for side in samples.values():
        assert [s["id"] for s in side] == sorted(s["id"] for s in side)  # the source's order
        for sample in side:
            item = by_id.pop(sample["id"])
            assert sample == {
                "id": item["id"],
                "image": (pairs.images / item["image"]).read_bytes(),
                "prompt": item["conversations"][0]["value"],
                "answer": item["conversations"][1]["value"],
            }
    assert not by_id


def test_every_shard_has_hashes_and_samples(pairs: Any) -> None:
    pairs.add(30)
    summary = pairs.convert(**SMALL)
    for side in ("train", "eval"):
        shards = shards_of(pairs.out / side)
        assert len(shards) == summary.shards[side] > 1
        for shard in shards:
            assert set(shard["raw_data"]["hashes"]) == {"xxh64"}
            assert shard["samples"] > 0
            assert shard["raw_data"]["bytes"] <= SMALL["size_limit"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_destination_that_is_a_file_is_left_alone(pairs: Any, below: str) -> None:
    pairs.add(3)
    pairs.out.write_text("precious")
    with pytest.raises(ConversionError, match=f"{pairs.out / below} is no folder, or lies in a "):
        pairs.convert(pairs.out / below)
    assert pairs.out.read_text() == "precious"


def test_summary(pairs: Any) -> None:
    pairs.add(20)
    summary = pairs.convert(max_samples=10, eval_ratio=0.2, seed=3)
    written = json.loads((pairs.out / "summary.json").read_text())
    assert written == json.loads(summary.to_json())
    assert written["source_items"] == 20
    assert written["samples_in"] == 10 == written["train"] + written["eval"]
    assert written["bytes"] == sum(path.stat().st_size for path in pairs.out.rglob("*.mds"))
    assert written["seconds"] > 0
    assert written["images"]["width"] == {"min": 32, "max": 32, "mean": 32.0}
    assert written["images"]["height"] == {"min": 24, "max": 24, "mean": 24.0}
    assert written["arguments"]["seed"] == 3
    assert written["arguments"]["max_samples"] == 10
    assert set(written["versions"]) >= {"vlm-composer", "mosaicml-streaming", "pillow"}


def test_the_same_arguments_write_the_same_bytes(pairs: Any) -> None:
    pairs.add(20)
    pairs.convert(**SMALL)
    first = {name: (pairs.out / name).read_bytes() for name in pairs.files()}
    pairs.convert(**SMALL, overwrite=True)
    second = {name: (pairs.out / name).read_bytes() for name in pairs.files()}
    del first["summary.json"], second["summary.json"]
    assert first == second


def test_without_an_eval_side(pairs: Any) -> None:
    pairs.add(3)
    summary = pairs.convert(eval_ratio=0)
    assert (summary.train, summary.eval) == (3, 0)
    assert pairs.files() == [
        "quality.json", "rejects.jsonl", "summary.json",
        "train/index.json", "train/shard.00000.00000.mds",
    ]  # fmt: skip


def test_a_data_set_is_refused_and_overwritten_whole(pairs: Any) -> None:
    pairs.add(30)
    pairs.convert(**SMALL)
    before = pairs.files()
    with pytest.raises(ConversionError, match=r"already holds \d+ files .* --overwrite"):
        pairs.convert(**SMALL)
    assert pairs.files() == before

    pairs.convert(max_samples=2, eval_ratio=0, overwrite=True)
    assert [name for name in pairs.files() if name.endswith(".mds")] == [
        "train/shard.00000.00000.mds"
    ]
    assert len(pairs.ids("train")) == 2


def test_a_mistake_in_the_source_leaves_the_old_data_set_alone(pairs: Any) -> None:
    pairs.add(5)
    pairs.convert()
    before = pairs.files()
    pairs.items.clear()
    with pytest.raises(ConversionError, match="empty list"):
        pairs.convert(overwrite=True)
    assert pairs.files() == before


@pytest.mark.parametrize(
    "name", ["train/notes.txt", "eval/sub/shard.00000.00000.mds", "train/.hidden"]
)
def test_files_of_others_are_never_deleted(pairs: Any, name: str) -> None:
    pairs.add(5)
    theirs = pairs.out / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(ConversionError, match=f"no conversion wrote, such as {name}"):
        pairs.convert(overwrite=True)
    assert pairs.files() == [name]


NAMES = ("../victim", "..", ".", "", "/", "a/../../victim", "a/b", "a\\b", "C:x", "a\0b", "a\nb")
NOT_NAMES = (*NAMES[:3], *NAMES[4:], ".convert", "\ud800", "ü", "x" * 101, None, 3, ["a"], {"a": 1})


@pytest.fixture
def victim(pairs: Any) -> Iterator[Path]:
    """A whole data set beside the one that is overwritten, which must stay as it is."""
    pairs.add(12)
    other = pairs.folder / "victim"
    pairs.convert(str(other), **SMALL)
    pairs.convert(**SMALL)

    def files() -> dict[Path, tuple[int, bytes]]:
        found = (path for path in other.rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    before = files()
    assert len(before) > 5
    yield other
    assert files() == before


def refuse_to_overwrite(pairs: Any, problem: str) -> None:
    before = pairs.files()
    with pytest.raises(ConversionError, match=problem) as error:
        pairs.convert(**SMALL, overwrite=True)
    assert str(error.value).isprintable()
    assert pairs.files() == before


@pytest.mark.parametrize("name", ["{victim}", *(n for n in NOT_NAMES if isinstance(n, str))])
def test_a_summary_names_what_no_source_is_called(pairs: Any, victim: Path, name: str) -> None:
    path = pairs.out / "summary.json"
    summary = json.loads(path.read_text())
    summary["sources"] = {"good": {}, name.format(victim=victim): {}}
    path.write_text(json.dumps(summary))
    refuse_to_overwrite(
        pairs, r"summary\.json (names a source .*: nothing was deleted|does not say)"
    )


@pytest.mark.parametrize("name", ["{victim}", *NOT_NAMES])
def test_a_plan_names_what_no_source_is_called(pairs: Any, victim: Path, name: Any) -> None:
    name = name.format(victim=victim) if isinstance(name, str) else name
    (pairs.out / "summary.json").unlink()
    (pairs.out / ".convert").mkdir()
    plan = {"sources": [{"name": "good"}, {"name": name}]}
    (pairs.out / ".convert" / "plan.json").write_text(json.dumps(plan))
    refuse_to_overwrite(pairs, r"plan\.json (names a source .*: nothing was del|does not)")


DOCUMENTS = (
    "{",
    "[]",
    "3",
    "[" * 9999,
    '{"sources": ' + "9" * 400 + "}",
    '{"sources": "../victim"}',
)


@pytest.mark.parametrize("text", DOCUMENTS, ids=range(len(DOCUMENTS)))
@pytest.mark.parametrize("name", ["summary.json", ".convert/plan.json"])
def test_a_file_that_is_no_summary_and_no_plan(
    pairs: Any, victim: Path, name: str, text: str
) -> None:
    (pairs.out / ".convert").mkdir()
    (pairs.out / "summary.json").unlink()
    (pairs.out / name).write_text(text)
    refuse_to_overwrite(pairs, r"(summary|plan)\.json (names a source|does not say)")


@pytest.mark.parametrize("link", ["train", ".convert", ".convert/staging"])
def test_a_link_out_of_the_destination(pairs: Any, victim: Path, link: str) -> None:
    path = pairs.out / link
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    target = victim / path.name
    target.mkdir(exist_ok=True)
    (victim / "staging").mkdir(exist_ok=True)
    path.symlink_to(target if target.name == "train" else victim)
    with pytest.raises(ConversionError, match=r"leads to .*, outside|is a link to "):
        pairs.convert(**SMALL, overwrite=True)
    assert (victim / "staging").is_dir()


def test_files_beside_the_data_set_stay(pairs: Any) -> None:
    pairs.add(5)
    pairs.out.mkdir()
    (pairs.out / "README").write_text("mine")
    pairs.convert()
    assert (pairs.out / "README").read_text() == "mine"


def test_a_worker_that_outlives_its_killed_run_disturbs_nobody(tmp_path: Path) -> None:
    name, whole = "train/shard.mds", b"all of the shard"
    killed, next_run = Folder(os.fspath(tmp_path)), Folder(os.fspath(tmp_path))
    killed.lock()
    worker = pickle.loads(pickle.dumps(killed))  # as a worker gets it
    assert killed._lock is not None
    killed._lock.release()  # by the kernel, as its process is gone
    next_run.lock()
    staged = next_run.stage(name)
    with staged.open("wb") as file:
        file.write(whole[:3])
        late = worker.stage(name)
        late.write_bytes(whole)
        worker.publish(late, name).result()
        assert (tmp_path / name).read_bytes() == whole
        file.write(whole[3:])
    next_run.publish(staged, name).result()
    assert (tmp_path / name).read_bytes() == whole
    worker.stage(name).write_bytes(whole)
    next_run.close()
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_folder_with_a_colon_in_its_name(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.add(3)
    monkeypatch.chdir(pairs.folder)
    pairs.convert("s3:data")  # streaming would take it for a URL
    assert (pairs.folder / "s3:data" / "train" / "index.json").is_file()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://host/prefix", "one of s3://, gs://, azure://"),
        ("file:///tmp/x", "one of s3://, gs://, azure://"),
        ("s3:///prefix", "give s3://bucket/prefix"),
        ("s3://bucket/a?b", r"without \? or #"),
        ("s3://bucket/a#b", r"without \? or #"),
    ],
)
def test_malformed_urls(pairs: Any, url: str, problem: str) -> None:
    pairs.add(3)
    with pytest.raises(ConversionError, match=problem):
        pairs.convert(url)


@pytest.mark.s3
def test_azure_holds_what_a_folder_would(pairs: Any, azure_server: Any) -> None:
    pairs.add(60)
    pairs.convert(**SMALL)
    url = azure_server.make_bucket("convert-azure")
    pairs.convert(f"{url}/data", max_samples=30, **SMALL)
    with pytest.raises(ConversionError, match=f"{url}/data already holds"):
        pairs.convert(f"{url}/data", **SMALL)
    pairs.convert(f"{url}/data", **SMALL, overwrite=True)
    names = pairs.files()
    assert azure_server.keys("convert-azure") == [f"data/{name}" for name in names]
    container = azure_server.client().get_container_client("convert-azure")
    for name in set(names) - {"summary.json"}:  # which has times
        found = container.download_blob(f"data/{name}").readall()
        assert found == (pairs.out / name).read_bytes()


@pytest.mark.s3
class TestS3:
    """The same promises, kept by a real S3 server."""

    def test_samples_read_back_as_they_were(self, pairs: Any, s3_server: Any) -> None:
        pairs.add(60)
        url = s3_server.make_bucket("convert-round-trip") + "/some/prefix"
        summary = pairs.convert(url, **SMALL)
        assert summary.shards["train"] > 8  # more than may wait for their upload
        assert s3_server.keys("convert-round-trip") == sorted(
            [
                *(
                    f"some/prefix/{name}"
                    for name in ("quality.json", "rejects.jsonl", "summary.json")
                ),
                *(f"some/prefix/{side}/index.json" for side in ("train", "eval")),
                *(
                    f"some/prefix/{side}/shard.00000.{number:05}.mds"
                    for side, count in summary.shards.items()
                    for number in range(count)
                ),
            ]
        )
        samples = pairs.read("train", remote=url) + pairs.read("eval", remote=url)
        assert {s["id"]: s["image"] for s in samples} == {
            item["id"]: (pairs.images / item["image"]).read_bytes() for item in pairs.items
        }

    def test_a_data_set_is_refused_and_overwritten_whole(self, pairs: Any, s3_server: Any) -> None:
        pairs.add(30)
        url = s3_server.make_bucket("convert-overwrite")
        pairs.convert(url, **SMALL)
        before = s3_server.keys("convert-overwrite")
        with pytest.raises(ConversionError, match="already holds"):
            pairs.convert(url, **SMALL)
        assert s3_server.keys("convert-overwrite") == before
        pairs.convert(url, max_samples=2, eval_ratio=0, overwrite=True)
        assert s3_server.keys("convert-overwrite") == [
            "quality.json", "rejects.jsonl", "summary.json",
        "train/index.json", "train/shard.00000.00000.mds",
        ]  # fmt: skip

    def test_too_many_rejects_leave_only_their_list(self, pairs: Any, s3_server: Any) -> None:
        pairs.add(60)
        pairs.add(2, image="nothing.jpg")
        url = s3_server.make_bucket("convert-rejects") + "/prefix/"
        with pytest.raises(ConversionError, match=r"s3://convert-rejects/prefix/rejects\.jsonl"):
            pairs.convert(url, **SMALL)
        assert s3_server.keys("convert-rejects") == ["prefix/rejects.jsonl"]

    def test_a_bucket_that_does_not_exist(self, pairs: Any, s3_server: Any) -> None:
        pairs.add(3)
        with pytest.raises(ConversionError, match="could not list s3://convert-nowhere"):
            pairs.convert("s3://convert-nowhere/prefix")

    def test_a_server_that_comes_back_is_waited_for(
        self, pairs: Any, s3_server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put, uploads = S3Store.put, iter(range(1_000))
        revival = threading.Thread(target=s3_server.start)
        once = threading.Lock()

        def put_while_it_is_killed(store: S3Store, path: Path, name: str) -> None:
            if next(uploads) == 3:
                s3_server.kill()
            try:
                put(store, path, name)
            except Exception:
                if once.acquire(blocking=False):
                    revival.start()
                raise

        monkeypatch.setattr(S3Store, "put", put_while_it_is_killed)
        pairs.add(60)
        url = s3_server.make_bucket("convert-outage")
        pairs.convert(url, **SMALL)
        assert once.locked(), "no upload failed"
        revival.join()
        ids = pairs.ids("train", remote=url) + pairs.ids("eval", remote=url)
        assert sorted(ids) == [item["id"] for item in pairs.items]

    def test_nothing_stays_on_the_local_disk(
        self, pairs: Any, s3_server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        staging = pairs.folder / "staging"
        staging.mkdir()
        monkeypatch.setattr("tempfile.tempdir", os.fspath(staging))
        pairs.add(5)
        pairs.convert(s3_server.make_bucket("convert-staging"))
        assert not [path for path in staging.rglob("*") if path != user_folder()]
