"""Conversions that are killed anywhere and go on, and those that get in each other's way."""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killed_runs import kill_at

from convert import ConversionError
from convert.destination import open_destination
from vlm_composer.storage import S3Store
from written_files import written

SETTINGS: dict[str, Any] = {
    "eval_ratio": 0.1,
    "drop_duplicates": True,
    "size_limit": 1 << 16,
    "max_reject_ratio": 0.1,
}
PLACES = {
    "in the first pass": ("convert.tasks:read_fields", 1500),
    "between the passes": ("convert.passes:find_exceptions", 1),
    "before any partition is finished": ("convert.tasks:read_record", 500),
    "in the second partition": ("convert.tasks:read_record", 1500),
    "with shards that the journal does not know of": ("convert.journal:Journal.finish", 2),
    "in the merge": ("convert.merge:publish_index", 2),
    "before the summary": ("convert.merge:Summary", 1),
    "in the cleaning": ("convert.destination:Destination.delete", 3),
}


@pytest.fixture(scope="module")
def source(pairs_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Items for three partitions; some share an image, some are copies, some are bad."""
    pairs = pairs_in(tmp_path_factory.mktemp("source"))
    pairs.add(1200)
    for shared in pairs.items[:40:2]:
        pairs.add(image=shared["image"])
    pairs.items += pairs.items[100:120]
    pairs.add(3, image="nothing.jpg")
    pairs.add(1000)
    return pairs


@pytest.fixture
def many(source: Any, tmp_path: Path) -> Any:
    """`source`, to be converted to a place of the test's own."""
    pairs = copy.copy(source)
    pairs.items, pairs.folder, pairs.out = [*source.items], tmp_path, tmp_path / "out"
    return pairs


@pytest.fixture(scope="module")
def undisturbed(source: Any) -> dict[str, bytes]:
    source.convert(**SETTINGS)
    return written(source.out)


@pytest.fixture
def staging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where runs keep what is on its way. Its path is short, for it holds workers' sockets."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


def left(staging: Path) -> list[Path]:
    """What conversions left there. (A killed Python leaves folders of its libraries.)"""
    return list(staging.glob("vlm-composer-*"))


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on(
    many: Any, undisturbed: dict[str, bytes], staging: Path, place: str
) -> None:
    kill_at(*PLACES[place], many.folder, many.write_json(), many.images, many.out, **SETTINGS)
    assert (many.out / ".convert" / "plan.json").exists()
    assert left(staging)
    many.convert(**SETTINGS)
    assert written(many.out) == undisturbed
    assert not left(staging)


def test_workers_of_a_killed_run_end_with_it(
    many: Any, undisturbed: dict[str, bytes], staging: Path
) -> None:
    kill_at(
        "convert.tasks:read_record", 500, many.folder,
        many.write_json(), many.images, many.out, **SETTINGS, workers=2,
    )  # fmt: skip
    many.convert(**SETTINGS)
    assert written(many.out) == undisturbed
    assert not left(staging)


def test_a_summary_that_no_conversion_wrote_is_not_believed(pairs: Any) -> None:
    pairs.add(5)
    place = "convert.journal:Journal.delete", 1  # all is done but to clean up
    kill_at(*place, pairs.folder, pairs.write_json(), pairs.images, pairs.out, eval_ratio=0)
    path = pairs.out / "summary.json"
    whole = path.read_text()
    for text in ("{", "{}", "[]", whole.replace('"train": 5', '"train": "5"')):
        path.write_text(text)
        with pytest.raises(
            ConversionError, match=r"summary\.json is not one of a finished .*: rem"
        ):
            pairs.convert(eval_ratio=0)
    path.write_text(whole)
    assert pairs.convert(eval_ratio=0).train == 5


@pytest.fixture(scope="module")
def killed_once(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left that was killed when two of three partitions were finished."""
    folder = tmp_path_factory.mktemp("killed")
    place = "convert.journal:Journal.finish", 3
    kill_at(*place, folder, source.write_json(), source.images, folder / "out", **SETTINGS)
    return folder / "out"


@pytest.fixture
def killed(many: Any, killed_once: Path) -> Any:
    """`many`, whose conversion was killed."""
    shutil.copytree(killed_once, many.out)
    return many


def data_set(folder: Path) -> dict[Path, int]:
    """The files of the sides, and when they were written."""
    return {
        path: path.stat().st_mtime_ns for path in folder.glob("*/*") if path.parent.name[0] != "."
    }


def test_a_killed_run_is_no_data_set(killed: Any) -> None:
    assert len(data_set(killed.out)) > 20
    assert {path.suffix for path in data_set(killed.out)} == {".mds"}
    assert not (killed.out / "summary.json").exists()


def test_what_is_finished_is_not_done_again(killed: Any) -> None:
    before = {
        path: time for path, time in data_set(killed.out).items() if ".00002." not in path.name
    }
    assert len(before) > 10
    killed.convert(**SETTINGS)
    assert before.items() <= data_set(killed.out).items()


def test_shards_that_somebody_deleted_are_written_again(
    killed: Any, undisturbed: dict[str, bytes]
) -> None:
    next(killed.out.glob("train/shard.00000.*")).unlink()
    killed.convert(**SETTINGS)
    assert written(killed.out) == undisturbed


def test_another_command_does_not_go_on_with_it(killed: Any) -> None:
    before = data_set(killed.out)
    with pytest.raises(ConversionError, match=r"eval_ratio 0\.1 \(now 0\.2\): .*--overwrite"):
        killed.convert(**SETTINGS | {"eval_ratio": 0.2})
    killed.json_path = killed.folder / "other.json"
    with pytest.raises(ConversionError, match=r"unfinished conversion with sources\.0\.json"):
        killed.convert(**SETTINGS)
    assert data_set(killed.out) == before
    killed.items = killed.items[:20]
    killed.convert(eval_ratio=0, overwrite=True)
    assert [name for name in killed.files() if name.endswith(".mds")] == [
        "train/shard.00000.00000.mds"
    ]


def test_two_runs_do_not_write_to_one_place(pairs: Any) -> None:
    pairs.add(5)
    with open_destination(pairs.out):
        with pytest.raises(ConversionError, match=f"is being written by process {os.getpid()}"):
            pairs.convert()
        assert (pairs.out / ".convert" / "lock").exists()
    pairs.convert()


@pytest.mark.s3
class TestS3:
    """The same with a bucket, whose journal is in it."""

    def test_a_killed_run_goes_on(self, many: Any, staging: Path, s3_server: Any) -> None:
        bucket = f"convert-killed-{os.getpid()}"
        url = s3_server.make_bucket(bucket) + "/some/prefix"
        place = "convert.journal:Journal.finish", 2
        kill_at(*place, many.folder, many.write_json(), many.images, url, **SETTINGS)
        assert "some/prefix/.convert/00000.json" in s3_server.keys(bucket)
        many.convert(url, **SETTINGS)
        many.convert(f"{url}-undisturbed", **SETTINGS)
        found: dict[str, dict[str, str]] = {url: {}, f"{url}-undisturbed": {}}
        for key in s3_server.keys(bucket):
            run, _, name = f"s3://{bucket}/{key}".partition("prefix")[2].partition("/")
            head = s3_server.client().head_object(Bucket=bucket, Key=key)
            found[f"{url}{run}"][name] = head["ETag"]
        for names in found.values():
            del names["summary.json"]
        assert found[url] == found[f"{url}-undisturbed"]
        assert not left(staging)

    def test_a_store_that_stays_away(
        self, many: Any, staging: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = s3_server.make_bucket(f"convert-away-{os.getpid()}")
        put, uploads = S3Store.put, iter(range(1_000))

        def put_until_it_is_killed(store: S3Store, path: Path, name: str) -> None:
            if next(uploads) == 40:
                s3_server.kill()
            put(store, path, name)

        monkeypatch.setattr("convert.destination._PATIENCE", 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(S3Store, "put", put_until_it_is_killed)
            with pytest.raises(ConversionError, match=r"away for .* start the run again"):
                many.convert(url, **SETTINGS)
        s3_server.start()
        many.convert(url, **SETTINGS)
        assert len(many.ids("train", remote=url)) > 1900

    def test_the_local_disk_is_bounded(
        self, many: Any, staging: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = s3_server.make_bucket(f"convert-bounded-{os.getpid()}")
        put, most = S3Store.put, 0

        def put_and_look(store: S3Store, path: Path, name: str) -> None:
            nonlocal most
            # In both lists, so that all of them are there between the two.
            there = set(staging.rglob("*.mds")) & set(staging.rglob("*.mds"))
            most = max(most, len(there))
            put(store, path, name)

        monkeypatch.setattr(S3Store, "put", put_and_look)
        summary = many.convert(url, **SETTINGS | {"size_limit": 1 << 13})
        assert summary.shards["train"] > 100
        assert 1 < most <= 4
