"""Small Parquet files that are gigabytes once they are read: their rows are rejected, or the file.

What is measured is measured in a process of its own, which may have no more than 3 GiB.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convert.errors import Rejected
from convert.sources import LlavaJson, Parquet
from convert.sources.files import InputFile
from convert.sources.parquet_pages import Chunk, LargePageError, PageCheckedFile
from parquet_files import TURNS, table_of, write
from source_items import LIMIT, outcomes_of

ROOT = Path(__file__).parents[2]
MOST_MEMORY = 600 << 10  # KiB: four times a page, which is unpacked, copied, and copied to a value
READ = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
import pyarrow.parquet
from convert.errors import ConversionError, Rejected
from convert.sources import Parquet

def said(value):
    return str(value) if isinstance(value, Rejected) else "fine"

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

found, before = [], peak()
source = Parquet(sys.argv[1], 1 << 26)
try:
    for piece in source.pieces(source.files()[0]):
        for item in source.read(piece, [True] * piece.count):
            found.append([said(item.fields), said(item.image)])
except ConversionError as error:
    found = str(error)
print(json.dumps([found, peak() - before]))
"""


def repeated(value: Any, count: int) -> pa.Array:
    """An array of the same value, which is there once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def images(value: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([value, pa.nulls(len(value), pa.string())], ["bytes", "path"])


def write_bomb(path: Path, columns: dict[str, pa.Array], **options: Any) -> Path:
    """A file of less than 100 kB."""
    options = {"compression": "zstd", "store_schema": False, **options}
    pq.write_table(pa.table(columns), path, **options)
    assert path.stat().st_size < 100_000
    return path


def read_bomb(path: Path) -> Any:
    """What became of each row's text and image, once it was not much memory that it took."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, kilobytes = json.loads(done.stdout)
    assert kilobytes < MOST_MEMORY
    return found


def test_an_image_that_is_repeated(tmp_path: Path) -> None:
    columns = {"image": images(repeated(bytes(100 << 20), 40)), "caption": repeated("it", 40)}
    found = read_bomb(write_bomb(tmp_path / "it.parquet", columns))
    too_large = "too_large: image: 104857600 bytes, more than a shard holds (67108864)"
    assert found == [["fine", too_large]] * 40


def test_a_caption_that_is_repeated(tmp_path: Path) -> None:
    columns = {"image": images(repeated(b"x", 40)), "caption": repeated("y" * (100 << 20), 40)}
    found = read_bomb(write_bomb(tmp_path / "it.parquet", columns))
    too_large = "too_large: caption: 104857600 bytes, more than a shard holds (67108864)"
    assert found == [[too_large, "fine"]] * 40


def conversations(text: str, turns: int, rows: int) -> pa.Array:
    said = pa.StructArray.from_arrays(
        [repeated("human", rows * turns), repeated(text, rows * turns)], ["from", "value"]
    )
    return pa.ListArray.from_arrays(pa.array(range(0, (rows + 1) * turns, turns), pa.int32()), said)


@pytest.mark.parametrize(
    ("text", "turns", "problem"),
    [
        ("z" * (1 << 20), 900, "943718400 bytes, more than a shard holds (67108864)"),
        ("z", 400_000, "400000 turns, more than 10000"),
    ],
    ids=["long", "many"],
)
def test_a_turn_that_is_repeated(tmp_path: Path, text: str, turns: int, problem: str) -> None:
    columns = {
        "image": images(repeated(b"x", 3)),
        "conversations": conversations(text, turns, 3),
    }
    found = read_bomb(write_bomb(tmp_path / "it.parquet", columns))
    assert found == [[f"too_large: conversations: {problem}", "fine"]] * 3


def large_page(path: Path) -> Path:
    """Three images of 60 MB in one page, before a row group of one that is small."""
    options: dict[str, Any] = {"use_dictionary": False, "compression": "zstd"}
    schema = pa.schema({"image": pa.binary(), "caption": pa.string()})
    with pq.ParquetWriter(path, schema, **options) as file:
        for size, rows in ((60 << 20, 3), (7, 1)):
            rows_of = {"image": pa.array([bytes(size)] * rows), "caption": ["it"] * rows}
            file.write_table(pa.table(rows_of))
    assert path.stat().st_size < 100_000
    return path


def test_a_page_that_is_too_large_costs_its_row_group(tmp_path: Path) -> None:
    *large, small = read_bomb(large_page(tmp_path / "it.parquet"))
    problem = "too_large: the column image has, at byte 4, a page of "
    for text, image in large:
        assert text == image
        assert text.startswith(problem)
        assert " bytes that unpacks to 188743" in text
    assert len(large) == 3
    assert small == ["fine", "fine"]


def varint(number: int, length: int = 0) -> bytes:
    """A signed number as Thrift writes it, in as many bytes as it takes or is said to."""
    number, data = number << 1, b""
    while number or not data or len(data) < length:
        data += bytes([number & 0x7F | 0x80])
        number >>= 7
    return data[:-1] + bytes([data[-1] & 0x7F])


def test_a_footer_that_lies_is_found_out(tmp_path: Path) -> None:
    """It says that the page is small, so that nobody looks before it is read."""
    path = large_page(tmp_path / "it.parquet")
    size = pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
    data, told = path.read_bytes(), varint(size)
    at = data.rindex(told)
    path.write_bytes(data[:at] + varint(5, len(told)) + data[at + len(told) :])
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 5
    found = read_bomb(path)
    assert found.startswith(f"{path} is not a whole Parquet file (LargePageError: the column image")
    assert found.endswith("): fetch or make it again")


def test_rows_that_a_footer_makes_up(tmp_path: Path) -> None:
    columns = {"image": pa.array([b"x"] * 77), "caption": repeated("it", 77)}
    path = write_bomb(tmp_path / "it.parquet", columns)
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    many = data[footer:].replace(b"\x16" + varint(77), b"\x16" + varint(10**13))
    path.write_bytes(data[:footer] + many[:-8] + (len(many) - 8).to_bytes(4, "little") + b"PAR1")
    assert pq.ParquetFile(path).metadata.num_rows == 10**13
    assert "is not a whole Parquet file (ValueError: 10000000000000 rows in" in read_bomb(path)


def test_texts_that_are_stored_as_changes_of_each_other(tmp_path: Path) -> None:
    columns = {
        "image": pa.array([b"x"] * 3),
        "conversations": pa.array([[{"from": "human", "value": "z" * 5000}] * 40] * 3, TURNS),
    }
    leaf = "conversations.list.element."
    encodings = {"image": "PLAIN", f"{leaf}from": "PLAIN", f"{leaf}value": "DELTA_BYTE_ARRAY"}
    options = {"use_dictionary": False, "column_encoding": encodings}
    found = read_bomb(write_bomb(tmp_path / "it.parquet", columns, **options))
    assert "a page of DELTA_BYTE_ARRAY, whose texts can repeat each other" in found


WRITERS: list[dict[str, Any]] = [
    *[{"compression": name} for name in ("none", "snappy", "gzip", "brotli", "zstd", "lz4")],
    *[{"data_page_version": version, "data_page_size": 2000} for version in ("1.0", "2.0")],
    {"use_dictionary": False, "write_statistics": False},
    {"row_group_size": 7, "write_batch_size": 2, "data_page_size": 10},
    {"write_page_index": True, "write_page_checksum": True},
    {"column_encoding": {"id": "DELTA_BYTE_ARRAY"}, "use_dictionary": ["image.bytes"]},
    {"store_schema": False, "version": "1.0"},
]


@pytest.mark.parametrize("options", WRITERS, ids=range(len(WRITERS)))
def test_what_others_write_is_read(pairs: Any, options: dict[str, Any]) -> None:
    pairs.add(60)
    path = write(pairs.folder / "it.parquet", table_of(pairs), **options)
    expected = outcomes_of(LlavaJson(pairs.write_json(), pairs.images, LIMIT))
    assert outcomes_of(Parquet(str(path), LIMIT)) == expected


PAGES = {
    # A field: its type in the low four bits, and by how much its number is larger in the high ones.
    "two numbers of one field": b"\x15\x00\x15\x02\x05\x04\x80\x80\x80\x80\x08\x15\x02\x00",
    "a number beyond 32 bits": b"\x15\x00\x15" + varint(1 << 32) + b"\x15\x02\x00",
    "a negative size": b"\x15\x00\x15\x01\x15\x02\x00",
    "no size": b"\x15\x00\x00",
    "a struct for a number": b"\x15\x00\x1c\x00\x15\x02\x00",
    "an unknown type": b"\x1d\x00",
    "structs without end": b"\x1c" * 20_000,
    "a number without end": b"\x15" + b"\xff" * 20_000,
    "nothing": b"",
}


@pytest.mark.parametrize("what", PAGES)
def test_a_header_that_can_be_read_in_two_ways(tmp_path: Path, what: str) -> None:
    path = tmp_path / "it"
    path.write_bytes(PAGES[what])
    with pytest.raises(ValueError, match=r"at byte 0, a page whose header is damaged"):
        PageCheckedFile(str(path)).check(Chunk(0, 1 << 20, "image", False))


def page(unpacked: int, packed: int, values: int) -> bytes:
    """A header: kind 0, the sizes, and as field 5 the number of values and their encoding."""
    numbers = b"".join(b"\x15" + varint(number) for number in (0, unpacked, packed))
    return numbers + b"\x2c\x15" + varint(values) + b"\x15\x00\x00\x00"


@pytest.mark.parametrize(
    ("pages", "problem"),
    [
        ([page(1 << 27, 9, 1)], None),
        ([page((1 << 27) + 1, 9, 1)], "of 9 bytes that unpacks to 134217729"),
        ([page(1 << 20, 9, 1 << 26)], None),
        ([page(1 << 20, 9, 1 << 26), page(1, 9, 1)], "with the 67108865th value of its row group"),
    ],
)
def test_what_pages_may_take(tmp_path: Path, pages: list[bytes], problem: str | None) -> None:
    path = tmp_path / "it"
    path.write_bytes(b"".join(header + bytes(9) for header in pages))
    file = PageCheckedFile(str(path))
    for read in (lambda c: file.check(c), lambda c: (file.watch([c]), file.read_at(3, 1000))):
        chunk = Chunk(0, path.stat().st_size, "image", False)
        if problem is None:
            read(chunk)
            assert chunk.header == chunk.end
        else:
            with pytest.raises(LargePageError, match=problem):
                read(chunk)
    assert file.size == InputFile(str(path)).size


def test_a_rejected_row_says_why(tmp_path: Path) -> None:
    source = Parquet(str(large_page(tmp_path / "it.parquet")), LIMIT)
    (piece, _) = source.pieces(source.files()[0])
    (item,) = source.read(piece, [False, True, False])
    assert isinstance(item.fields, Rejected)
    assert item.index == 1
