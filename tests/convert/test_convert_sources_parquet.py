"""Parquet files as Hugging Face's datasets are: the same items, in pieces of their row groups."""

import json
import tracemalloc
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import ConversionError
from convert.errors import Reason, Rejected
from convert.sources import LlavaJson, Parquet
from parquet_files import IMAGE, TURNS, table_of, write
from source_items import (
    LIMIT,
    check_pieces_are_independent,
    contents_of,
    items_of,
    outcome,
    outcomes_of,
    pieces_of,
    zip_of,
)
from store_server import SERVERS


@pytest.mark.parametrize("rows_of_a_group", [7, 100, 1000])
def test_the_same_items_as_from_json(pairs: Any, rows_of_a_group: int) -> None:
    pairs.add(600)
    half = 290
    folder = pairs.folder / "rows"
    for number, items in enumerate((pairs.items[:half], pairs.items[half:])):
        path = folder / f"train-{number:05}.parquet"
        write(path, table_of(pairs, items), row_group_size=rows_of_a_group)
    (folder / "README.md").write_text("no rows")
    from_json = LlavaJson(pairs.write_json(), pairs.images, LIMIT)
    source = Parquet(str(folder), LIMIT)
    assert contents_of(source) == contents_of(from_json)
    counts = [piece.count for piece in pieces_of(source)]
    assert sum(counts) == 600
    assert counts == {7: [7] * 41 + [3] + [7] * 44 + [2], 100: [100, 100, 90, 100, 100, 100, 10],
                      1000: [256, 34, 256, 54]}[rows_of_a_group]  # fmt: skip
    check_pieces_are_independent(source)
    for pattern in ("rows/*.parquet", "rows/train-0000{0..1}.parquet", "rows/train-0000[01]*"):
        assert pieces_of(Parquet(str(pairs.folder / pattern), LIMIT)) == pieces_of(source)
    source.close()


@pytest.mark.parametrize("text", ["caption", "text"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_and_a_caption(pairs: Any, text: str, kind: Any) -> None:
    pairs.add(3)
    images = [(pairs.images / item["image"]).read_bytes() for item in pairs.items]
    captions = ["a cat\n", None, "日本"]
    write(
        pairs.folder / "cats.parquet", {"jpg": pa.array(images, kind), text: captions, "n": [1] * 3}
    )
    items = items_of(Parquet(str(pairs.folder / "cats.parquet"), LIMIT))
    assert items[0].fields == {
        "id": "cats-00000000",
        "image": "cats.parquet:0",
        "conversations": [
            {"from": "human", "value": ""},
            {"from": "gpt", "value": "a cat\n"},
        ],
    }
    first, second, third = (outcome(item) for item in items)
    assert first == {
        "id": "cats-00000000",
        "image": images[0],
        "prompt": "<image>",
        "answer": "a cat\n",
    }
    assert second == (Reason.BAD_TURN, "the gpt turn's value is None")
    assert third["answer"] == "日本"  # type: ignore[call-overload]


def test_rows_that_are_bad(pairs: Any) -> None:
    pairs.add(9)
    table = table_of(pairs)
    images = table["image"].to_pylist()
    images[0] = None
    images[1]["bytes"] = None
    images[2] = {"bytes": None, "path": None}
    images[3]["bytes"] = bytes(LIMIT + 1)
    images[4]["bytes"] = b"404"
    turns = table["conversations"].to_pylist()
    turns[5], turns[6], turns[7] = None, [], [{"from": "human", "value": "\0"}, None]
    path = write(
        pairs.folder / "bad.parquet",
        {
            "id": table["id"],
            "image": pa.array(images, IMAGE),
            "conversations": pa.array(turns, TURNS),
        },
    )
    found = [outcome(item) for item in items_of(Parquet(str(path), LIMIT))]
    assert [one[0] for one in found[:8]] == [  # type: ignore[index]
        *(Reason.MISSING_IMAGE, Reason.MISSING_IMAGE, Reason.MISSING_IMAGE, Reason.TOO_LARGE),
        *(Reason.NOT_AN_IMAGE, Reason.NO_CONVERSATION, Reason.NO_CONVERSATION, Reason.BAD_TURN),
    ]
    assert "holds only the path '00000/000000001.jpg': give --images" in found[1][1]  # type: ignore[index]
    assert found[8]["id"] == "000000008"  # type: ignore[call-overload]


def test_paths_are_read_where_images_says(pairs: Any) -> None:
    pairs.add(5)
    names = [item["image"] for item in pairs.items[:4]] + ["absent.jpg"]
    path = write(pairs.folder / "paths.parquet", {"image": names, "caption": ["it"] * 5})
    expected = [*((pairs.images / name).read_bytes() for name in names[:4]), Reason.MISSING_IMAGE]
    archive = zip_of(
        {n: (pairs.images / n).read_bytes() for n in names[:4]}, pairs.folder / "i.zip"
    )
    for images in (pairs.images, archive):
        source = Parquet(str(path), LIMIT, images=str(images))
        assert source.fingerprint()["images"]
        found = [item.image for item in items_of(source)]
        assert [one.reason if isinstance(one, Rejected) else one for one in found] == expected
        source.close()
    assert set(outcomes_of(Parquet(str(path), LIMIT))) == {Reason.MISSING_IMAGE}


def test_text_that_is_no_unicode_costs_its_row(pairs: Any) -> None:
    pairs.add(3)
    table = table_of(pairs)
    raw = pa.array([b"good", b"\xff\xfe", b"good"], pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = write(pairs.folder / "it.parquet", {"image": table["image"], "caption": captions})
    assert [
        one if isinstance(one, str) else "" for one in outcomes_of(Parquet(str(path), LIMIT))
    ] == [*("", Reason.NOT_UNICODE, "")]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (
            {"image": [b"1"]},
            "it.parquet holds the columns image: binary: there must be one of conv",
        ),
        ({"caption": ["1"], "foto": [b"1"]}, "there must be one of image, img"),
        ({"image": [1], "caption": ["1"]}, "the column image is int64: an image is bytes"),
        ({"image": [b"1"], "caption": [["1"]]}, r"caption is list<.*>, not text"),
        ({"image": [b"1"], "conversations": ["[]"]}, "conversations is string, not a list of str"),
        ({"image": [b"1"], "conversations": [[{"role": "a"}]]}, "not a list of structs of from"),
    ],
)
def test_columns_that_cannot_be(pairs: Any, columns: dict[str, Any], problem: str) -> None:
    write(pairs.folder / "it.parquet", columns)
    with pytest.raises(ConversionError, match=problem):
        pieces_of(Parquet(str(pairs.folder / "it.parquet"), LIMIT))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not Parquet at all",
        lambda data: data[: len(data) // 2],
        lambda data: data[:200] + b"\xff" * 3000 + data[3200:],
    ],
)
def test_a_damaged_file_is_named(pairs: Any, damage: Any) -> None:
    pairs.add(20)
    path = write(pairs.folder / "it.parquet", table_of(pairs))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConversionError, match=r"it\.parquet is not a whole Parquet file"):
        items_of(Parquet(str(path), LIMIT))


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(
    damage=st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_damage_is_refused_or_rejected_and_never_crashes(
    small_file: Path, damage: list[tuple[int, int]]
) -> None:
    data = bytearray(small_file.read_bytes())
    for place, value in damage:
        data[place % len(data)] = value
    path = small_file.with_name("damaged.parquet")
    path.write_bytes(data)
    with suppress(ConversionError):
        outcomes_of(Parquet(str(path), LIMIT))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    images = [{"bytes": bytes([n]) * 90, "path": f"{n}.jpg"} for n in range(20)]
    rows = {"image": pa.array(images, IMAGE), "caption": [f"number {n}" for n in range(20)]}
    return write(folder / "small.parquet", rows, row_group_size=7)


def test_nothing_there(pairs: Any) -> None:
    (pairs.folder / "empty").mkdir()
    for pattern in ("empty", "absent", "*.parquet", "it-{0..3}.parquet"):
        with pytest.raises(ConversionError, match=r"no such file, and nothing named \.parquet"):
            Parquet(str(pairs.folder / pattern), LIMIT).files()
    for pattern in ("it-{0..99999999}.parquet", "it-{3..1}.parquet"):
        with pytest.raises(ConversionError, match=r"stands for \d+ files: give from 1 to 1000000"):
            Parquet(str(pairs.folder / pattern), LIMIT).files()


def test_a_row_group_is_not_held_in_memory(pairs: Any) -> None:
    images = [{"bytes": bytes([n % 256]) * 60_000, "path": f"{n}.jpg"} for n in range(800)]
    rows = {"image": pa.array(images, IMAGE), "caption": ["it"] * 800}
    options = {"compression": "none", "use_dictionary": False}
    # A page is what is held at a time, and unless told so pyarrow starts none within 1024 rows.
    path = write(pairs.folder / "it.parquet", rows, **options, write_batch_size=16)
    del images, rows
    source = Parquet(str(path), LIMIT)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    most = count = 0
    for piece in pieces_of(source):
        for _ in source.read(piece, [True] * piece.count):
            most = max(most, pa.total_allocated_bytes() - before)
            count += 1
    assert count == 800
    assert most < 12e6  # of 48
    assert tracemalloc.get_traced_memory()[1] < 12e6
    tracemalloc.stop()
    source.close()


@pytest.mark.s3
@pytest.mark.parametrize("server", SERVERS.values())
def test_files_in_a_bucket(pairs: Any, server: str, request: Any, put_in_bucket: Any) -> None:
    pairs.add(40)
    folder = pairs.folder / "rows"
    for number in range(2):
        items = pairs.items[number * 20 :][:20]
        write(folder / f"{number}.parquet", table_of(pairs, items), row_group_size=15)
    url = request.getfixturevalue(server).make_bucket(f"parquet-{uuid.uuid4().hex}")
    put_in_bucket(folder, f"{url}/rows")
    expected = outcomes_of(Parquet(str(folder), LIMIT))
    for pattern in ("/rows", "/rows/", "", "/rows/*.parquet", "/rows/{0..1}.parquet"):
        source = Parquet(url + pattern, LIMIT)
        assert source.files() == [f"{url}/rows/{number}.parquet" for number in range(2)]
        assert source.fingerprint()["files"] == 2
    assert outcomes_of(source) == expected
    assert json.loads(json.dumps(source.fingerprint())) == source.fingerprint()
    with pytest.raises(ConversionError, match="nothing named"):
        Parquet(f"{url}/absent", LIMIT).files()
    with pytest.raises(ConversionError, match="there is no such object"):
        pieces_of(Parquet(f"{url}/absent.parquet", LIMIT))
