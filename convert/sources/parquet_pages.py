"""The pages of a Parquet file, looked at before pyarrow unpacks them.

A page says to how many bytes it unpacks, and pyarrow takes its word: 50 kB of a file can be six
values of 256 MB. What the file's footer says of a column need not be true, so it is the headers of
the pages themselves that are read, as the bytes pass by: a bucket is asked for nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from convert.sources.files import InputFile
from vlm_composer.mds.json_object import is_count

_PAGE_BYTES = 1 << 27
"""128 MiB, to which any page may unpack. Writers make pages of 1 MB, or of 1024 rows."""
_RATIO = 4
"""A larger page may unpack to so many times its bytes: images are packed already."""
_CHUNK_VALUES = 1 << 26
"""Of a column in a row group: each takes a few bytes of memory, be it null or repeated."""

_HEADER_BYTES = (1 << 14, 1 << 20, 1 << 24)
"""Read of a header, until it is whole: it can hold the least and the largest value."""
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
"""Kinds of pages."""
_OF_KIND = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}
"""Field of a page's header that has what is the kind's own."""
_DELTA_BYTE_ARRAY = 7
_DEPTH = 8


class LargePageError(ValueError):
    """A page takes more memory than one may."""


def most_unpacked(packed: int) -> int:
    """Bytes to which a page, or all of a column that needs no look at its pages, may unpack."""
    return max(_PAGE_BYTES, _RATIO * packed)


@dataclass
class Chunk:
    """A column of a row group, and how far its pages were looked at."""

    start: int
    end: int
    column: str
    repeated: bool
    """Whether a row can hold several of its values."""
    header: int = field(init=False)
    """Where the next page begins."""
    values: int = 0

    def __post_init__(self) -> None:
        self.header = self.start


class PageCheckedFile(InputFile):
    """A Parquet file of which no page is read that unpacks to more than it may.

    Args:
        location: A path, or the URL of an object.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._chunks: list[Chunk] = []

    def watch(self, chunks: list[Chunk]) -> None:
        """Look at the pages of these columns, and no others, when their bytes are read."""
        self._chunks = chunks

    def read_at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, fewer only where the file ends.

        Raises:
            LargePageError: A page begins there that takes more memory than one may.
            ValueError: The header of one is damaged.
        """
        data = super().read_at(offset, count)
        for chunk in self._chunks:
            while chunk.header < min(chunk.end, offset + len(data)):
                at = chunk.header - offset
                self._next_page(chunk, data[at : at + _HEADER_BYTES[0]] if at >= 0 else b"")
        return data

    def check(self, chunk: Chunk) -> None:
        """Look at all pages of a column before any is read.

        Raises:
            LargePageError: One takes more memory than one may.
            ValueError: The header of one is damaged.
        """
        while chunk.header < chunk.end:
            self._next_page(chunk, b"")

    def _next_page(self, chunk: Chunk, data: bytes) -> None:
        """Look at the header of a page, of which `data` may have the start, and go to the next."""
        what = f"the column {chunk.column} has, at byte {chunk.header}, a page"
        header, size = self._header(chunk.header, data)
        kind = header.get(1)
        own = header.get(_OF_KIND.get(kind, 0), {}) if is_count(kind) else None
        numbers: list[Any] = [kind, header.get(2), header.get(3)]
        numbers.append(own.get(1, 0) if isinstance(own, dict) else None)
        # Thrift takes the low 32 bits of a number: one that has more is another one to it.
        if not all(is_count(number) and number < 1 << 31 for number in numbers):
            raise ValueError(f"{what} whose header is damaged")
        _, unpacked, packed, values = numbers
        if unpacked > most_unpacked(packed):
            raise LargePageError(f"{what} of {packed} bytes that unpacks to {unpacked}")
        assert own is not None
        if own.get(4 if kind == _DATA_V2 else 2) == _DELTA_BYTE_ARRAY and chunk.repeated:
            raise LargePageError(f"{what} of DELTA_BYTE_ARRAY, whose texts can repeat each other")
        chunk.values += 0 if kind == _DICTIONARY else values
        if chunk.values > _CHUNK_VALUES:
            raise LargePageError(f"{what} with the {chunk.values}th value of its row group")
        chunk.header += size + packed

    def _header(self, offset: int, data: bytes) -> tuple[dict[int, Any], int]:
        """Fields of a page's header, and its bytes; no fields where it is damaged."""
        for count in (0, *_HEADER_BYTES):
            try:
                return _fields(super().read_at(offset, count) if count else data, 0, 0)
            except IndexError:  # there is more of it
                continue
            except ValueError:
                break
        return {}, 0


def _fields(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Fields of a struct in Thrift's compact protocol, by their numbers, and where it ends."""
    if depth > _DEPTH:
        raise ValueError("it is nested too deep")
    found: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        if number in found:
            raise ValueError("it has a field twice")
        found[number], at = _value(data, at, head & 15, depth)
    return found, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """A value of one of the protocol's types; of texts, lists and maps only where it ends."""
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind == 3:  # byte
        return data[at], at + 1
    if kind in (4, 5, 6):  # i16, i32, i64
        return _integer(data, at)
    if kind == 7:  # double
        return None, at + 8
    if kind == 8:  # text
        length, at = _varint(data, at)
        return None, at + length
    if kind == 12:
        return _fields(data, at, depth + 1)
    kinds: tuple[int, ...]
    if kind in (9, 10):  # list, set
        count, kinds, at = data[at] >> 4, (data[at] & 15,), at + 1
        if count == 15:
            count, at = _varint(data, at)
    elif kind == 11:  # map
        count, at = _varint(data, at)
        kinds, at = ((data[at] >> 4, data[at] & 15), at + 1) if count else ((), at)
    else:
        raise ValueError(f"it has a value of type {kind}")
    for _ in range(count):
        for each in kinds:
            # Here a bool is a byte.
            _, at = _value(data, at, 3 if each in (1, 2) else each, depth + 1)
    return None, at


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("it has a number of more than 64 bits")
