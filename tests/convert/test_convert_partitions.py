"""Partitions, several workers and several sources: one data set, whoever writes it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming.base.format import reader_from_json

from convert import ConversionError, convert_llava, convert_pairs
from convert.engine import LocalEngine
from convert.errors import NoDataSet
from convert.partition import Partitions
from convert.sources import LlavaJson, Piece
from source_items import images_of, tar_of, zip_of
from written_files import written

SETTINGS: dict[str, Any] = {"eval_ratio": 0.1, "size_limit": 1 << 15, "max_reject_ratio": 0.1}


class Counted:
    """A source of items that nobody reads, in files of so many."""

    def __init__(self, *counts: int, name: str = "") -> None:
        self.name = name
        self.counts = counts

    def files(self) -> list[str]:
        return [str(number) for number in range(len(self.counts))]

    def pieces(self, file: str) -> Any:
        for start in range(0, self.counts[int(file)], 256):
            count = min(256, self.counts[int(file)] - start)
            yield Piece(count, {"file": file, "start": start})


def cut(folder: Path, *sources: Counted, workers: int = 1) -> list[Any]:
    partitions = Partitions(sources, LocalEngine(workers), folder)  # type: ignore[arg-type]
    assert partitions.source_items == [sum(source.counts) for source in sources]
    listed = list(partitions)
    assert list(partitions) == listed  # as often as asked
    return listed


def test_partitions_follow_each_other(tmp_path: Path) -> None:
    listed = cut(tmp_path, Counted(5000, 3, 700, name="a"), Counted(20, name="b"))
    assert [partition.number for partition in listed] == list(range(len(listed)))
    assert [partition.source for partition in listed] == [0] * (len(listed) - 1) + [1]
    start = 0
    for partition in listed:
        assert partition.start == start
        assert partition.num_items <= 1024
        start += partition.num_items
    assert start == 5723
    assert listed[-1].start_in_source == 0
    found = [(piece.where["file"], piece.where["start"]) for p in listed for piece in p.pieces]
    assert found[:20] == [("0", 256 * number) for number in range(20)]
    assert found[20:] == [("1", 0), ("2", 0), ("2", 256), ("2", 512), ("0", 0)]


@pytest.mark.parametrize(
    ("items", "largest"), [(100, 100), (30_000, 1024), (100_000, 3072), (558_128, 8192)]
)
def test_their_size_follows_the_number_of_items(tmp_path: Path, items: int, largest: int) -> None:
    assert max(partition.num_items for partition in cut(tmp_path, Counted(items))) == largest


def test_files_are_listed_side_by_side(tmp_path: Path) -> None:
    counts = [100 + number for number in range(9)]
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    assert cut(alone, Counted(*counts)) == cut(together, Counted(*counts), workers=2)


def test_any_number_of_workers_writes_the_same_bytes(pairs: Any) -> None:
    pairs.add(1500)
    for shared in pairs.items[:40:2]:
        pairs.add(image=shared["image"])
    pairs.add(5, image="nothing.jpg")
    pairs.add(1000)
    runs = []
    for workers in (1, 2, 7):
        out = pairs.folder / f"out{workers}"
        pairs.convert(out, **SETTINGS, workers=workers)
        runs.append(written(out))
    assert len([name for name in runs[0] if name.endswith(".mds")]) > 60
    assert runs[0] == runs[1] == runs[2]
    ids = [sample["id"] for sample in stored(out / "train")]
    assert ids == [item["id"] for item in pairs.items if item["id"] in set(ids)]


def test_images_in_an_archive_give_the_same_shards(pairs: Any) -> None:
    """Read by workers, to which an open archive cannot be sent."""
    pairs.add(1100)
    images, runs = images_of(pairs), []
    folder = pairs.folder
    places = {
        "folder": pairs.images,
        "zip": zip_of(images, folder / "images.zip"),
        "tar": tar_of(images, folder / "images.tar"),
    }
    for name, place in places.items():
        out = folder / name
        convert_llava(pairs.write_json(), place, out, **SETTINGS, workers=2, show_progress=False)
        runs.append(written(out))
    assert runs[0] == runs[1] == runs[2]


def stored(folder: Path) -> list[dict[str, Any]]:
    """The samples of a side, read without the shared memory that a StreamingDataset takes."""
    if not folder.exists():
        return []
    shards = json.loads((folder / "index.json").read_text())["shards"]
    readers = [reader_from_json(str(folder), None, shard) for shard in shards]
    return [reader[index] for reader in readers for index in range(len(reader))]


@pytest.fixture
def two(pairs: Any, pairs_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two data sets, the second with its own images."""
    other = pairs_in(tmp_path_factory.mktemp("other"))
    pairs.add(30)
    other.add(20)
    other.items[3]["image"] = "nothing.jpg"
    return pairs, other


def convert_both(two: Any, out: Path, **options: Any) -> Any:
    sources = [
        LlavaJson(source.write_json(), source.images, 1 << 20, name)
        for source, name in zip(two, ("first", "second"), strict=True)
    ]
    return convert_pairs(sources, out, show_progress=False, **SETTINGS | options)


def test_several_sources(two: Any) -> None:
    first, _ = two
    summary = convert_both(two, first.out)
    names = {name.rpartition("/")[0] for name in first.files()}
    assert names == {"", "first/train", "first/eval", "second/train"} | (
        {"second/eval"} if summary.sources["second"].eval else set()
    )
    assert summary.source_items == 50
    assert summary.sources["first"].source_items == 30
    assert summary.sources["second"].rejected_by_reason == {"missing_image": 1}
    assert summary.bytes == sum(counts.bytes for counts in summary.sources.values())
    (line,) = first.rejects()
    assert (line["source"], line["index"], line["id"]) == ("second", 3, "000000003")
    assert json.loads((first.out / "summary.json").read_text())["sources"]["second"]["rejected"]
    first.out = first.out / "first"
    # The same images are in both sources, so that they are on one side of all.
    assert len(first.ids("train")) == summary.sources["first"].train


def test_a_data_set_of_other_sources_is_overwritten_whole(two: Any) -> None:
    first, _ = two
    convert_both(two, first.out, eval_ratio=0)
    with pytest.raises(ConversionError, match="already holds"):
        first.convert(eval_ratio=0)
    first.convert(eval_ratio=0, overwrite=True)
    assert not [name for name in first.files() if name.startswith(("first/", "second/"))]


@pytest.mark.parametrize(
    "names", [("", "b"), ("a", "a"), ("train", "b"), ("a/b", "c"), ("..", "b")]
)
def test_names_that_cannot_be(two: Any, names: tuple[str, str]) -> None:
    sources = [
        LlavaJson(source.write_json(), source.images, 1 << 20, name)
        for source, name in zip(two, names, strict=True)
    ]
    with pytest.raises(ConversionError, match="called"):
        convert_pairs(sources, two[0].out)
    assert not two[0].out.exists()


@settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_image_is_on_both_sides(
    pairs_in: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Also of two sources, whichever items share an image; and nothing is lost."""
    two = [pairs_in(tmp_path_factory.mktemp("source")) for _ in range(2)]
    for source in two:
        source.add(12)
        source.items = [
            {**item, "image": source.items[data.draw(st.integers(0, 11))]["image"]}
            for item in source.items
        ]
    out = two[0].out
    drop = data.draw(st.booleans())
    seed = data.draw(st.integers(0, 99))
    try:
        summary = convert_both(two, out, eval_ratio=0.3, seed=seed, drop_duplicates=drop)
    except NoDataSet:
        assert not two[0].files()
        return
    images: dict[str, list[bytes]] = {"train": [], "eval": []}
    for name in ("first", "second"):
        for side, seen in images.items():
            seen += [sample["image"] for sample in stored(out / name / side)]
    assert images["eval"]
    assert not set(images["train"]) & set(images["eval"])
    assert len(images["train"]) + len(images["eval"]) + summary.duplicates == 24
    assert drop or summary.duplicates == 0
