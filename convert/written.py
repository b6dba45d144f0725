"""What a conversion has written, found and read back: for `inspect` and `verify`."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from convert.destination import JOURNAL, REJECTS, SUMMARY
from convert.errors import ConversionError
from convert.mds import HASHES, text_decoder
from convert.split import SIDES, Side
from vlm_composer.data.schema import MDS_COLUMNS, Record
from vlm_composer.outages import ride_out
from vlm_composer.storage import Store, open_store

Decode = Callable[[bytes], Record]
"""From a sample's bytes to the record."""

INDEX = "index.json"
_FEATURES = "features.json"
_IN_A_SIDE = re.compile(r"((?:[^/]+/)?)(train|eval)/(.+)")
_PATIENCE = 60.0
"""Seconds that the store may be away."""


class IndexFaultError(ValueError):
    """An index.json is not one that a conversion writes."""


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
    entry: dict[str, Any]
    """What the index says of it."""

    @property
    def name(self) -> str:
        """Its file's, in the destination."""
        return f"{self.folder}/{self.entry['raw_data']['basename']}"

    @property
    def bytes(self) -> int:
        """Of its file."""
        return int(self.entry["raw_data"]["bytes"])

    @property
    def hashes(self) -> dict[str, str]:
        """Of its file: algorithm → hexadecimal digest."""
        return dict(self.entry["raw_data"]["hashes"])

    @property
    def samples(self) -> int:
        """How many it holds."""
        return int(self.entry["samples"])

    def decoder(self) -> Decode:
        """What makes records of its samples' bytes; it raises ValueError where they are none."""
        names, encodings = self.entry["column_names"], self.entry["column_encodings"]
        return cast(Decode, text_decoder(names, encodings))


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
        if not self.sides and INDEX in self.files:
            raise ConversionError(
                f"{self.place} is one side of a data set: give the folder above it, as --out was"
            )
        if not self.sides and SUMMARY not in self.files:
            raise ConversionError(
                f"{self.place} holds no data set (no train/ and no eval/): give what --out was "
                "given"
            )
        if any(f"{folder.path}/{_FEATURES}" in self.files for folder in self.sides):
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
        if name not in self.files:
            return None
        try:
            value = json.loads(self.read(name, self.files[name]))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value

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
        try:
            index = self.read_json(f"{folder.path}/{INDEX}")
        except ValueError as error:
            raise IndexFaultError(str(error)) from error
        if index is None:
            raise IndexFaultError("missing: the conversion did not finish")
        entries = index.get("shards")
        if not isinstance(entries, list) or not entries:
            raise IndexFaultError("names no shards")
        for number, entry in enumerate(entries):
            if fault := _entry_fault(entry):
                raise IndexFaultError(f"entry {number}: {fault}")
        return [Shard(folder.path, entry) for entry in entries]

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
        return shard.decoder()(self.read(shard.name, end - begin, begin))


def places(shards: list[Shard], numbers: list[int]) -> Iterator[tuple[Shard, int]]:
    """Where the samples with these numbers are, counted over all shards; both in order."""
    wanted, first = iter(sorted(numbers)), 0
    number = next(wanted, None)
    for shard in shards:
        while number is not None and number < first + shard.samples:
            yield shard, number - first
            number = next(wanted, None)
        first += shard.samples


def _entry_fault(entry: Any) -> str | None:
    """What is wrong with an index's entry; None where a conversion could have written it."""
    try:
        raw = entry["raw_data"]
        well_typed = (
            isinstance(raw["basename"], str)
            and isinstance(raw["bytes"], int)
            and isinstance(entry["samples"], int)
            and entry["samples"] > 0
        )
        if not well_typed:
            return "name, bytes or samples are of a wrong type"
        if missing := [name for name in HASHES if not isinstance(raw["hashes"].get(name), str)]:
            return f"{raw['basename']} has no {' and no '.join(missing)}"
        # Before anything is decoded: `Shard.decoder` knows texts and bytes alone.
        columns = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
        if (entry["format"], entry["version"], columns) != ("mds", 2, MDS_COLUMNS):
            return f"{raw['basename']} is of {entry['format']} with {columns}"
        if entry["compression"] or entry["zip_data"] or any(entry["column_sizes"]):
            return f"{raw['basename']} is compressed"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"not what MDS writes ({error!r})"
    return None
