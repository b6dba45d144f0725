"""What a conversion has written, found and read back: for `inspect` and `verify`."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from convert.destination import JOURNAL, REJECTS, SUMMARY
from convert.errors import ConversionError
from convert.mds import HASHES
from convert.split import SIDES, Side
from vlm_composer.data.schema import MDS_COLUMNS, Record
from vlm_composer.mds.encodings import SampleDecoder
from vlm_composer.mds.index import (
    FEATURES_FILE,
    INDEX_FILE,
    IndexFaultError,
    ShardEntry,
    parse_index,
)
from vlm_composer.mds.json_object import MAX_JSON_BYTES, parse_object
from vlm_composer.outages import ride_out
from vlm_composer.storage import Store, open_store

_COLUMNS = dict(sorted(MDS_COLUMNS.items()))
"""As they stand in a shard."""
_decode = SampleDecoder(_COLUMNS)
_IN_A_SIDE = re.compile(r"((?:[^/]+/)?)(train|eval)/(.+)")
_PATIENCE = 60.0
"""Seconds that the store may be away."""


@dataclass(frozen=True)
class SideFolder:
    """One side of one source, as its files are named in the destination."""

    source: str
    """Its name where the data set has several, else empty."""

    side: Side

    @property
    def path(self) -> str:
        """Such as "train", or "emoji/train"."""
        return f"{self.source}/{self.side}" if self.source else self.side


@dataclass(frozen=True)
class Shard:
    """A shard as its index describes it."""

    folder: str
    entry: ShardEntry

    @property
    def name(self) -> str:
        """Its file's, in the destination."""
        return f"{self.folder}/{self.entry.raw.basename}"

    @property
    def bytes(self) -> int:
        """Of its file."""
        return self.entry.raw.bytes

    @property
    def samples(self) -> int:
        """How many it holds."""
        return self.entry.samples


class Written:
    """A destination, as found.

    Args:
        place: A folder, or s3://bucket/prefix, gs://bucket/prefix or azure://container/prefix.

    Raises:
        ConversionError: If there is no data set, or one of features in place of images.
        StoreError: If the store cannot be used.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        if "://" not in place and not Path(place).is_dir():
            raise ConversionError(f"{place}: no such folder; give what --out was given")
        self.store: Store = open_store(place)
        sizes = ride_out(self.store.sizes, f"list {place}", _PATIENCE)
        # Some stores list folders.
        self.files = {name: size for name, size in sizes.items() if not name.endswith("/")}
        """Name and bytes of every file."""
        found = {
            SideFolder(match[1].rstrip("/"), side)
            for name in self.files
            if (match := _IN_A_SIDE.fullmatch(name))
            for side in SIDES
            if match[2] == side and not match[1].startswith(f"{JOURNAL}/")
        }
        self.sides = sorted(found, key=lambda f: (f.source, SIDES.index(f.side)))
        """Sides of which there are files, by source, train before eval."""
        self._refuse_what_is_none()

    def _refuse_what_is_none(self) -> None:
        if not self.sides and INDEX_FILE in self.files:
            raise ConversionError(
                f"{self.place} is one side of a data set: give the folder above it, as --out was"
            )
        if not self.sides and SUMMARY not in self.files:
            raise ConversionError(
                f"{self.place} holds no data set (no train/ and no eval/): give what --out was "
                "given"
            )
        if any(f"{folder.path}/{FEATURES_FILE}" in self.files for folder in self.sides):
            raise ConversionError(
                f"{self.place} holds features, and no images to look at: give the data set that "
                "they were made of, which its summary.json names under `sources`"
            )

    def read(self, name: str, count: int, start: int = 0) -> bytes:
        """`count` bytes of a file from `start` on, or fewer where it ends."""
        return ride_out(
            lambda: self.store.read(name, count, start), f"read {self.place}/{name}", _PATIENCE
        )

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None where there is no such file.

        Raises:
            ValueError: If it is no JSON object.
        """
        return parse_object(self._text(name)) if name in self.files else None

    def _text(self, name: str) -> bytes:
        """A small file, or more of it than is parsed."""
        return self.read(name, min(self.files[name], MAX_JSON_BYTES + 1))

    def num_rejects(self) -> int | None:
        """Lines of rejects.jsonl; None where there is none."""
        if REJECTS not in self.files:
            return None
        step = 1 << 20
        starts = range(0, self.files[REJECTS], step)
        return sum(self.read(REJECTS, step, start).count(b"\n") for start in starts)

    def shards(self, folder: SideFolder) -> list[Shard]:
        """The shards of a side, in order.

        Raises:
            IndexFaultError: If the index is missing, or not one that a conversion writes.
        """
        name = f"{folder.path}/{INDEX_FILE}"
        if name not in self.files:
            raise IndexFaultError("missing: the conversion did not finish")
        index = parse_index(self._text(name))
        if [*index.columns.items()] != [*_COLUMNS.items()]:
            raise IndexFaultError(f"its columns are {dict(index.columns)}, not {_COLUMNS}")
        for number, entry in enumerate(index.shards):
            if entry.compression:
                raise IndexFaultError(f"shard {number}: it is compressed ({entry.compression})")
            if missing := [name for name in HASHES if name not in entry.raw.hashes]:
                raise IndexFaultError(f"shard {number}: it has no {' and no '.join(missing)}")
        return [Shard(folder.path, entry) for entry in index.shards]

    def sample(self, shard: Shard, index: int) -> Record:
        """One sample; of the shard, no more is read than it takes.

        Raises:
            ValueError: If it is not what a shard should hold.
        """
        offsets = self.read(shard.name, 8, 4 * (1 + index))
        if len(offsets) < 8:
            raise ValueError("the shard ends before it")
        begin, end = struct.unpack("<II", offsets)
        if not begin < end <= shard.bytes:
            raise ValueError(f"it is said to be from byte {begin} to {end} of {shard.bytes}")
        return decode_record(self.read(shard.name, end - begin, begin))


def decode_record(data: bytes) -> Record:
    """Take a sample's bytes apart.

    Raises:
        ValueError: They are not a record's.
    """
    return cast(Record, _decode(data))


def places(shards: list[Shard], numbers: list[int]) -> Iterator[tuple[Shard, int]]:
    """Where the samples with these numbers are, counted over all shards; both in order."""
    wanted, first = iter(sorted(numbers)), 0
    number = next(wanted, None)
    for shard in shards:
        while number is not None and number < first + shard.samples:
            yield shard, number - first
            number = next(wanted, None)
        first += shard.samples
