"""What is done with one partition, wherever it is done: it is hashed, then converted."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from convert.destination import Destination
from convert.duplicates import EXCEPTIONS, MOVED, hash_record, sorted_hashes
from convert.engine import Later, Tell
from convert.errors import ConversionError, Reason, Rejected
from convert.mds import ShardBuffer
from convert.partition import Partition
from convert.quality import Statistics
from convert.record import count_turns, read_fields, read_record
from convert.sources.source import Item, Source
from convert.split import EVAL, NOT_TAKEN, SIDES, TRAIN, Side, Split
from convert.writer import ShardWriter

_TELL_EVERY = 64
_SHOWN = 200
"""Characters of a value in a line of rejects.jsonl."""
_SIDES: dict[int, Side] = {TRAIN: "train", EVAL: "eval"}


@dataclass(frozen=True)
class Job:
    """What all partitions of a conversion have in common."""

    sources: Sequence[Source]
    source_items: Sequence[int]
    """Items of each source."""
    split: Split
    destination: Destination
    size_limit: int
    buffers: dict[Side, ShardBuffer] = field(
        default_factory=lambda: {side: ShardBuffer() for side in SIDES}
    )
    """Memory of each process, in which one partition's shards are made after another's."""

    def folder(self, source: int, side: Side) -> str:
        """The folder of a source's side, relative to the destination."""
        name = self.sources[source].name
        return f"{name}/{side}" if name else side

    def place(self, index: int) -> dict[str, Any]:
        """Where an item is found, as rejects.jsonl says it.

        Args:
            index: Its place among the items of all sources.
        """
        starts = np.cumsum([0, *self.source_items]).tolist()
        source = bisect_right(starts, index) - 1
        return self.place_in(source, index - starts[source])

    def place_in(self, source: int, index: int) -> dict[str, Any]:
        """Where an item is found, by its place in its source."""
        name = self.sources[source].name
        return {"source": name, "index": index} if name else {"index": index}


@dataclass(frozen=True)
class Task:
    """A partition, and what the split alone does not decide of it."""

    partition: Partition
    exceptions: npt.NDArray[Any] = field(default_factory=lambda: np.empty(0, EXCEPTIONS))
    """Its part of what `duplicates.find_exceptions` found."""


@dataclass(frozen=True)
class Update:
    """What a task tells while it is under way."""

    partition: int
    items: int
    """Done since the last time."""
    rejects: list[dict[str, Any]]
    """Lines of rejects.jsonl, since the last time."""


@dataclass
class Report:
    """What became of a partition. Of a finished one it is kept as JSON in the journal."""

    source: int
    samples_in: int = 0
    moved_to_train: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    """Of each side."""

    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of each folder that has any: what an index says of its shards."""

    rejects: list[dict[str, Any]] = field(default_factory=list)
    """Lines of rejects.jsonl."""

    statistics: Statistics = field(default_factory=Statistics)

    @property
    def by_reason(self) -> Counter[str]:
        """How many items were left out, for each reason."""
        return Counter(line["reason"] for line in self.rejects)

    def shard_names(self) -> Iterator[str]:
        """Of its shards, relative to the destination."""
        for folder, shards in self.shards.items():
            yield from (f"{folder}/{shard['raw_data']['basename']}" for shard in shards)

    def to_json(self) -> str:
        """A text for `from_json`."""
        return json.dumps({**self.__dict__, "statistics": self.statistics.to_json()})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What `to_json` gave."""
        value = json.loads(text)
        statistics = Statistics.from_json(value.pop("statistics"))
        return cls(statistics=statistics, samples=Counter(value.pop("samples")), **value)


def scan_partition(job: Job, task: Task, tell: Tell) -> npt.NDArray[Any]:
    """Hash what a partition's items show and say, without decoding an image.

    Args:
        job: What partitions have in common.
        task: The partition.
        tell: Is told how far it is, by an `Update`.

    Returns:
        An array of `duplicates.HASHES`, without items that will be rejected for another reason
        than that their image cannot be decoded.
    """
    partition = task.partition
    sides = job.split.sides(partition.start, partition.num_items)
    told = _Told(partition.number, tell)
    rows = []
    for offset, item in _taken(job, partition, sides):
        try:
            record = read_fields(item)
        except Rejected:
            pass  # the pass that writes will say so
        else:
            rows.append(hash_record(record, partition.start + offset, int(sides[offset])))
        told.done()
    told.all()
    return sorted_hashes(rows)


def write_partition(job: Job, task: Task, tell: Tell) -> Later[tuple[Report, npt.NDArray[Any]]]:
    """Check and decode a partition's items, and publish their shards.

    Args:
        job: What partitions have in common.
        task: The partition.
        tell: Is told how far it is, by an `Update`.

    Returns:
        What became of it, and the samples' `duplicates.HASHES`, later: once all its shards are
        published.
    """
    partition = task.partition
    sides = job.split.sides(partition.start, partition.num_items)
    offsets = task.exceptions["index"] - partition.start
    moved = task.exceptions["original"] == MOVED
    sides[offsets[moved]] = TRAIN
    originals = dict(
        zip(offsets[~moved].tolist(), task.exceptions["original"][~moved].tolist(), strict=True)
    )

    report = Report(partition.source, moved_to_train=int(moved.sum()))
    told = _Told(partition.number, tell)
    writers: dict[Side, ShardWriter] = {}
    rows = []
    for offset, item in _taken(job, partition, sides):
        report.samples_in += 1
        side = _SIDES[int(sides[offset])]
        try:
            if offset in originals:
                place = job.place(originals[offset])
                of = f" of {place['source']}" if "source" in place else ""
                raise Rejected(
                    Reason.DUPLICATE, f"the same image and text as item {place['index']}{of}"
                )
            record, size = read_record(item)
            if side not in writers:
                writers[side] = ShardWriter(
                    job.destination,
                    job.folder(partition.source, side),
                    job.size_limit,
                    partition=partition.number,
                    buffer=job.buffers[side],
                )
            writers[side].write(record)
        except Rejected as rejected:
            place = job.place_in(partition.source, partition.start_in_source + offset)
            line = reject_line(place, item, rejected)
            report.rejects.append(line)
            told.rejects.append(line)
        else:
            folder = job.folder(partition.source, side)
            report.statistics.add(record, size, count_turns(item), folder)
            rows.append(hash_record(record, partition.start + offset, int(sides[offset])))
        told.done()

    for side, writer in writers.items():
        writer.finish()
        report.samples[side] = writer.num_samples
        report.shards[job.folder(partition.source, side)] = writer.shards
    told.all()
    published = [shard for writer in writers.values() for shard in writer.published]
    return Later((report, sorted_hashes(rows)), published)


def reject_line(place: dict[str, Any], item: Item, rejected: Rejected) -> dict[str, Any]:
    """A line of rejects.jsonl.

    Args:
        place: Where the item is found.
        item: The item, as the source gave it.
        rejected: What is wrong with it.
    """
    fields = item.fields if isinstance(item.fields, dict) else {}
    return {
        **place,
        "id": _short(fields.get("id")),
        "image": _short(fields.get("image")),
        "reason": rejected.reason.value,
        "detail": rejected.detail[:500],
    }


def _short(value: object) -> str | int | None:
    """Return a text or a number in at most `_SHOWN` characters: an image may be base64."""
    if not isinstance(value, str | int):
        return None
    text = str(value)
    return value if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _taken(
    job: Job, partition: Partition, sides: npt.NDArray[np.int8]
) -> Iterator[tuple[int, Item]]:
    """The items of a partition that are on a side, each with its place in the partition."""
    source = job.sources[partition.source]
    start = 0
    for piece in partition.pieces:
        wanted = sides[start : start + piece.count] != NOT_TAKEN
        num_wanted, found = np.count_nonzero(wanted), 0
        if num_wanted:
            for item in source.read(piece, wanted.tolist()):
                yield start + item.index, item
                found += 1
        if found != num_wanted:  # nothing is to be lost without a word
            raise ConversionError(
                f"{source.name or 'the source'} gave {found} of {num_wanted} items at "
                f"{json.dumps(piece.where)}: leave its files alone while they are converted"
            )
        start += piece.count


class _Told:
    """Tells how far a task is, not too often."""

    def __init__(self, partition: int, tell: Tell) -> None:
        self._partition = partition
        self._tell = tell
        self._items = 0
        self.rejects: list[dict[str, Any]] = []

    def done(self) -> None:
        """One more item is done."""
        self._items += 1
        if self._items == _TELL_EVERY:
            self.all()

    def all(self) -> None:
        """Tell all that was not told yet."""
        if self._items:
            self._tell(Update(self._partition, self._items, self.rejects))
            self._items, self.rejects = 0, []
