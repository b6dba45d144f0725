"""The numbers of a data set, as `inspect` shows them on a terminal and on a page."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

from convert.destination import QUALITY, SUMMARY
from convert.errors import ConversionError
from convert.quality import Statistics
from convert.split import Side
from convert.written import Shard, SideFolder, Written, places
from vlm_composer.data.schema import Record
from vlm_composer.images.pil import open_image
from vlm_composer.mds.index import INDEX_FILE, IndexFaultError
from vlm_composer.mds.json_object import is_count, shown
from vlm_composer.read_ahead import map_ahead

LOOKED_AT = 500
"""Samples that the tables are made of where the conversion left no quality.json."""

_THREADS = 8
"""That read samples at a time: a bucket answers each after a while."""

_MOST_PROMPTS = 20
_MOST_ROWS = 1000
"""Of a table that a file has, and of the facts that are shown."""
_TITLES = {
    "words": "Answers, in words",
    "characters": "Answers, in characters",
    "width": "Images, width in pixels",
    "height": "Images, height in pixels",
    "bytes": "Images, bytes of the file",
}
"""Of the histograms of quality.json."""


@dataclass(frozen=True)
class Table:
    """Things, and how many there are of each."""

    title: str
    rows: list[tuple[str, int]]


@dataclass(frozen=True)
class Count:
    """What one side of one source holds."""

    folder: SideFolder
    samples: int
    shards: int
    bytes: int


@dataclass(frozen=True)
class Overview:
    """A data set in numbers."""

    place: str
    counts: list[Count]
    tables: list[Table]
    basis: str
    """What the tables were made of."""

    facts: list[tuple[str, str]]
    """How it was made: names and values."""


@dataclass(frozen=True)
class FoundSample:
    """A sample and where it is."""

    shard: Shard
    number: int
    record: Record


class Inspection:
    """A data set of which some samples are read, and of their shards nothing else.

    Args:
        place: A folder, or s3://bucket/prefix, gs://bucket/prefix or azure://container/prefix.

    Raises:
        ConversionError: If there is no data set of images, or not a whole one.
        StoreError: If the store cannot be used.
    """

    def __init__(self, place: str) -> None:
        self._written = Written(place)
        self._shards: dict[SideFolder, list[Shard]] = {}
        for folder in self._written.sides:
            try:
                self._shards[folder] = self._written.shards(folder)
            except IndexFaultError as error:
                raise ConversionError(
                    f"{place}/{folder.path}/{INDEX_FILE}: {error}; {_VERIFY}"
                ) from error
        if not self._shards:
            raise ConversionError(f"{place} holds no samples")

    def overview(self, side: Side, seed: int) -> Overview:
        """The data set in numbers.

        Args:
            side: Where samples are looked at if the conversion left no quality.json.
            seed: Decides which.

        Raises:
            ConversionError: If one of those cannot be read.
        """
        counts = [
            Count(folder, sum(s.samples for s in shards), len(shards), sum(s.bytes for s in shards))
            for folder, shards in self._shards.items()
        ]
        tables, basis = self._tables(side, seed)
        return Overview(self._written.place, counts, tables, basis, self._facts())

    def pick(self, side: Side, count: int, seed: int) -> list[FoundSample]:
        """Read random samples of a side, `count` of each source, in the data set's order.

        Raises:
            ConversionError: If there is no such side, or a sample cannot be read.
        """
        if not any(folder.side == side for folder in self._shards):
            raise ConversionError(f"{self._written.place} has no {side} side")
        return [
            sample
            for folder, shards in self._shards.items()
            if folder.side == side
            for sample in self._read(shards, count, seed)
        ]

    def _tables(self, side: Side, seed: int) -> tuple[list[Table], str]:
        try:
            quality = self._written.read_json(QUALITY)
            if quality is not None:
                samples = sum(s.samples for shards in self._shards.values() for s in shards)
                tables = list(_tables_of_quality(quality, samples))
                return tables, f"all samples, as {QUALITY} has them"
            missing = f"there is no {QUALITY}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            missing = f"{QUALITY} cannot be used: {error!r}"
        shards = [s for folder, ss in self._shards.items() if folder.side == side for s in ss]
        statistics, broken = Statistics(), 0
        for sample in self._read(shards, LOOKED_AT, seed):
            try:
                statistics.add(sample.record, _size(sample.record["image"]))
            except Exception:  # of Pillow's decoders, see `check_image`
                broken += 1
        looked_at = statistics.histograms["words"].count
        basis = f"{looked_at} random samples of {side}; {missing}"
        return list(_tables_of_statistics(statistics)), basis + (
            f"; {broken} more have broken images" if broken else ""
        )

    def _read(self, shards: list[Shard], count: int, seed: int) -> Iterator[FoundSample]:
        """Random samples, in order, of which some are read at a time."""
        total = sum(shard.samples for shard in shards)
        numbers = random.Random(seed).sample(range(total), min(count, total))
        with ThreadPoolExecutor(_THREADS) as threads:
            yield from map_ahead(threads, self._read_one, places(shards, numbers), _THREADS)

    def _read_one(self, place: tuple[Shard, int]) -> FoundSample:
        shard, number = place
        try:
            return FoundSample(shard, number, self._written.sample(shard, number))
        except ValueError as error:
            raise ConversionError(f"{shard.name}, sample {number}: {error}; {_VERIFY}") from error

    def _facts(self) -> list[tuple[str, str]]:
        """What the summary says of how the data set was made."""
        try:
            summary = self._written.read_json(SUMMARY)
        except ValueError as error:
            return [(SUMMARY, str(error))]
        if summary is None:
            return [(SUMMARY, "missing: the conversion did not finish")]
        # The index files and the tables have these.
        told = {"train", "eval", "shards", "bytes", "images", "sources"}
        facts = _flat({key: value for key, value in summary.items() if key not in told})
        return list(islice(facts, _MOST_ROWS))


_VERIFY = "`python -m convert verify` tells all that is wrong"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, str(value)


def _size(image: bytes) -> tuple[int, int]:
    with open_image(image) as opened:
        return opened.size


def _tables_of_quality(quality: Mapping[str, Any], samples: int) -> Iterator[Table]:
    """Make the tables of a quality.json, which anybody may have written.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: A value is not what it should be.
    """
    if quality["samples"] != samples:
        raise ValueError(f"samples is {shown(quality['samples'])}, the shards hold {samples}")
    prompts = [(str(found["prompt"]), _count(found["samples"])) for found in quality["prompts"]]
    yield _prompts(prompts, samples)
    histograms = quality["captions"] | quality["images"]
    for name, title in _TITLES.items():
        yield _histogram(title, histograms[name])
    yield Table("Images, format", _counts(quality["formats"]))
    yield Table(
        "To look at",
        [
            ("the same image and text as an earlier sample", _count(quality["exact_duplicates"])),
            ("the same image, another text", _count(quality["same_image_other_text"])),
            ("images with many texts (placeholders?)", _count(quality["placeholder_images"])),
            *(
                ("more than one round (only the first is used)", _count(turns["several_rounds"]))
                for turns in [quality.get("turns")]  # older conversions did not count them
                if turns
            ),
        ],
    )
    if quality["rejected_by_reason"]:
        yield Table("Rejected", _counts(quality["rejected_by_reason"]))


def _count(value: object) -> int:
    if not is_count(value):
        raise ValueError(f"{shown(value)} is not a count")
    return value


def _counts(values: Mapping[str, object]) -> list[tuple[str, int]]:
    if len(values) > _MOST_ROWS:
        raise ValueError(f"{len(values)} rows are more than {_MOST_ROWS}")
    return [(name, _count(value)) for name, value in values.items()]


def _tables_of_statistics(statistics: Statistics) -> Iterator[Table]:
    histograms = statistics.histograms
    yield _prompts(statistics.prompts.counts.items(), histograms["words"].count)
    for name, title in _TITLES.items():
        yield _histogram(title, asdict(histograms[name]))
    yield Table("Images, format", statistics.formats.most_common())


def _prompts(counts: Iterable[tuple[str, int]], samples: int) -> Table:
    rows = sorted(counts, key=lambda row: -row[1])[:_MOST_PROMPTS]
    if (others := samples - sum(count for _, count in rows)) > 0:
        rows.append(("… and others", others))
    return Table("Prompts", rows)


def _histogram(title: str, counted: Mapping[str, Any]) -> Table:
    """Bins with what they hold; empty ones at the ends are left out."""
    edges, bins = [*map(_count, counted["edges"])], [*map(_count, counted["bins"])]
    if not 0 < len(edges) == len(bins) <= _MOST_ROWS:
        raise ValueError(f"{len(edges)} edges and {len(bins)} bins")
    labels = [
        f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
        for low, high in pairwise(edges)
    ]
    labels.append(f"{edges[-1]:,} and more")
    filled = [index for index, count in enumerate(bins) if count] or [0]
    kept = slice(filled[0], filled[-1] + 1)
    return Table(title, list(zip(labels[kept], bins[kept], strict=True)))
