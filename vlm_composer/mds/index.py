"""The `index.json` of a data set: the one place that parses it.

What an index says is data. Its names become paths that are written, read and deleted, its encodings
choose what decodes a sample, its numbers are counted with: whoever reads one passes through here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

from vlm_composer.mds.encodings import SampleDecoder, fixed_bytes
from vlm_composer.mds.json_object import MAX_JSON_BYTES, is_count, parse_object, shown

INDEX_FILE = "index.json"
FEATURES_FILE = "features.json"
"""Beside the index of patches in place of images: what made them."""

Compression = Literal["br", "bz2", "gz", "snappy", "zstd"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""Of a shard's file: no separator, drive, control character, `.` or `..`, whatever reads it."""
_TAKEN = (INDEX_FILE, FEATURES_FILE)
_MAX_BYTES = (1 << 32) - 1
"""Of a shard: the places of its samples are 32-bit numbers."""
_HASH_KIND = re.compile(r"[a-z0-9_]{1,32}")
_DIGEST = re.compile(r"[0-9a-f]{1,128}")
_CONVERT = "write the shards with `python -m convert`"


class IndexFaultError(ValueError):
    """An index does not describe MDS shards that can be read; the message names the value."""


class DamagedIndexError(IndexFaultError):
    """A file is not an index at all: a copy that was damaged, perhaps."""


@dataclass(frozen=True)
class ShardFile:
    """A file of a shard."""

    basename: str
    """Its name: safe to join to a folder."""
    bytes: int
    hashes: Mapping[str, str]
    """Algorithm → hexadecimal digest."""


@dataclass(frozen=True)
class ShardEntry:
    """What an index says of a shard."""

    samples: int
    raw: ShardFile
    zipped: ShardFile | None
    """Its compressed file, where there is a `compression`."""
    compression: Compression | None

    @property
    def stored(self) -> ShardFile:
        """The file that is stored: the compressed one where there is one."""
        return self.zipped or self.raw


@dataclass(frozen=True)
class Index:
    """A data set of shards that all have the same columns; there is at least one."""

    columns: Mapping[str, str]
    """Column name → encoding, in the order in which a sample has them."""
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        """Of all shards."""
        return sum(shard.samples for shard in self.shards)


def read_index(path: Path, place: str | None = None) -> Index:
    """Read an index from the disk.

    Args:
        path: The file.
        place: What messages call it, where that is not its path.

    Raises:
        IndexFaultError: It cannot be used.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    try:
        return parse_index(data)
    except DamagedIndexError as error:
        raise DamagedIndexError(f"{place or path} is damaged: {error}; {_CONVERT}") from error
    except IndexFaultError as error:
        raise IndexFaultError(f"{place or path}: {error}; {_CONVERT}") from error


def parse_index(data: bytes) -> Index:
    """Parse and check an index.

    Args:
        data: The file.

    Raises:
        IndexFaultError: It cannot be used; the message names shard, field and value.
    """
    try:
        index = parse_object(data)
    except ValueError as error:
        raise DamagedIndexError(str(error)) from error
    if not {"version", "shards"} <= index.keys():
        raise DamagedIndexError("it has no version and shards")
    _check_equal(index, "version", 2)
    entries = _of_type(index, "shards", list)
    if not entries:
        raise IndexFaultError("it names no shards")
    columns: dict[str, str] = {}
    shards: list[ShardEntry] = []
    taken, least_bytes = {*_TAKEN}, 0
    for number, entry in enumerate(entries):
        try:
            found = _columns(_object(entry, "it"))
            if not shards:
                columns, least_bytes = found, SampleDecoder(found).least_bytes
            elif [*found.items()] != [*columns.items()]:
                _refuse("columns", found, f"those of shard 0, {shown(columns)}")
            shards.append(_shard(entry, least_bytes))
            for file in filter(None, (shards[-1].raw, shards[-1].zipped)):
                # Two names that differ in case are one file on some disks.
                if file.basename.lower() in taken:
                    raise IndexFaultError(f"the name {file.basename!r} is taken already")
                taken.add(file.basename.lower())
        except IndexFaultError as error:
            raise IndexFaultError(f"shard {number}: {error}") from error
    return Index(columns, tuple(shards))


def _columns(entry: dict[str, Any]) -> dict[str, str]:
    """Check the columns of a shard: name → encoding."""
    keys = ("column_names", "column_encodings", "column_sizes")
    names, encodings, sizes = (_of_type(entry, key, list) for key in keys)
    if not len(names) == len(encodings) == len(sizes) or not names:
        _refuse("column_names", names, f"one for each of {len(encodings)} encodings")
    columns: dict[str, str] = {}
    for name, encoding, size in zip(names, encodings, sizes, strict=True):
        if not isinstance(name, str) or not name.isprintable() or not name or name in columns:
            _refuse("column_names", name, "a text that prints, once")
        if not isinstance(encoding, str):
            _refuse("column_encodings", encoding, "text")
        try:
            fixed = fixed_bytes(encoding)
        except ValueError as error:
            raise IndexFaultError(f"column {shown(name)}: {error}") from error
        if type(size) is not type(fixed) or size != fixed:
            _refuse("column_sizes", size, f"{fixed} of {encoding}")
        columns[name] = encoding
    return columns


def _shard(entry: dict[str, Any], least_bytes: int) -> ShardEntry:
    """Check the rest of a shard, whose samples have `least_bytes` or more."""
    _check_equal(entry, "version", 2)
    _check_equal(entry, "format", "mds")
    raw = _file(entry, "raw_data")
    zipped = None if entry.get("zip_data") is None else _file(entry, "zip_data")
    named = entry.get("compression")
    compression = named if named is None else str(named).partition(":")[0]
    if compression not in (None, *get_args(Compression)):
        _refuse("compression", named, f"one of {', '.join(get_args(Compression))}")
    if (zipped is None) != (compression is None):
        _refuse("zip_data", entry.get("zip_data"), f"that of compression {shown(named)}")
    samples = entry.get("samples")
    # A shard has their number, where each begins, where the last one ends, and the samples.
    if not is_count(samples) or not samples or 8 + samples * (4 + least_bytes) > raw.bytes:
        _refuse("samples", samples, f"a number above 0 that {raw.bytes} bytes can hold")
    return ShardEntry(samples, raw, zipped, cast(Compression | None, compression))


def _file(entry: dict[str, Any], key: str) -> ShardFile:
    file = _object(entry.get(key), key)
    name, size = file.get("basename"), file.get("bytes")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(f"{key}.basename", name, "a file's name of letters, digits, '_', '-' and '.'")
    if not is_count(size) or not 0 < size <= _MAX_BYTES:
        _refuse(f"{key}.bytes", size, f"from 1 to {_MAX_BYTES}")
    hashes = _object(file.get("hashes"), f"{key}.hashes")
    for kind, digest in hashes.items():
        if not _HASH_KIND.fullmatch(kind):
            _refuse(f"{key}.hashes", kind, "an algorithm's name")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            _refuse(f"{key}.hashes.{kind}", digest, "hexadecimal digits")
    return ShardFile(name, size, hashes)


def _object(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(key, value, "an object")
    return value


def _of_type(entry: dict[str, Any], key: str, kind: type[list[Any]]) -> list[Any]:
    if not isinstance(value := entry.get(key), kind):
        _refuse(key, value, "a list")
    return value


def _check_equal(entry: dict[str, Any], key: str, expected: object) -> None:
    value = entry.get(key)
    if type(value) is not type(expected) or value != expected:
        _refuse(key, value, repr(expected))


def _refuse(key: str, value: object, wanted: str) -> NoReturn:
    raise IndexFaultError(f"{key} is {shown(value)}, not {wanted}")
