"""Whether a shard is what its index says, and every sample of it one to train on."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from convert.engine import Tell
from convert.errors import Rejected
from convert.images import check_image
from convert.written import Shard, decode_record
from vlm_composer.data.schema import IMAGE_PLACEHOLDER, Record
from vlm_composer.outages import TooLargeError, ride_out
from vlm_composer.storage import Store, open_store

MAX_FAULTS = 100
"""Of a shard that are told one by one; the others are counted."""

DIGEST = "S16"
"""numpy's type of an image's xxh3_128."""

_CHUNK_BYTES = 1 << 20
_PATIENCE = 60.0
"""Seconds that the store may be away during a download."""


@dataclass(frozen=True)
class ShardTask:
    """A shard to check, for any process."""

    place: str
    """The destination."""

    shard: Shard
    staging: str
    """A folder for what is downloaded, which someone else cleans up."""

    held_out: str | None = None
    """Where the images of the other side were saved, see `HeldOut`."""


@dataclass
class ShardReport:
    """What was found."""

    task: ShardTask
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)
    """A line for each, `MAX_FAULTS` at most."""

    digests: NDArray[np.bytes_] = field(default_factory=lambda: np.empty(0, DIGEST))
    """xxh3_128 of the image of each sample that was read."""

    samples: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Which samples those are."""

    def add(self, fault: str, sample: int | None = None, sample_id: str | None = None) -> None:
        """Notes a fault of the shard, or of a sample."""
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS:
            where = self.task.shard.name
            if sample is not None:
                where += f", sample {sample}"
            if sample_id is not None:
                where += f" (id {sample_id[:100]!r})"
            self.faults.append(f"{where}: {fault}")


@dataclass(frozen=True)
class HeldOut:
    """The images of the eval side, to be looked up from the train side's shards.

    What grows with them is mapped into memory from files that all processes share.
    """

    digests: NDArray[np.bytes_]
    """Sorted."""

    shards: NDArray[np.int64]
    """For each, the place of its shard in `names`."""

    samples: NDArray[np.int64]
    """For each, its sample in that shard."""

    names: list[str]

    @staticmethod
    def save(reports: Sequence[ShardReport], folder: Path) -> None:
        """Keeps what was found in the eval side's shards.

        Args:
            reports: At least one.
            folder: For `load`.
        """
        digests = np.concatenate([report.digests for report in reports])
        order = np.argsort(digests, kind="stable")
        shards = np.repeat(np.arange(len(reports)), [len(report.samples) for report in reports])
        np.save(folder / "digests.npy", digests[order])
        np.save(folder / "shards.npy", shards[order])
        np.save(folder / "samples.npy", np.concatenate([r.samples for r in reports])[order])
        names = [report.task.shard.name for report in reports]
        (folder / "names.json").write_text(json.dumps(names))

    @classmethod
    @cache  # once a process
    def load(cls, folder: str) -> HeldOut:
        """Opens what `save` kept."""
        digests, shards, samples = (
            np.load(Path(folder, f"{name}.npy"), mmap_mode="r", allow_pickle=False)
            for name in ("digests", "shards", "samples")
        )
        return cls(digests, shards, samples, json.loads(Path(folder, "names.json").read_text()))

    def find(self, digests: NDArray[np.bytes_]) -> Iterator[tuple[int, str]]:
        """Which of some images are held out: their place in `digests`, and where it is."""
        if not len(self.digests):
            return
        at = np.minimum(np.searchsorted(self.digests, digests), len(self.digests) - 1)
        for index in np.flatnonzero(self.digests[at] == digests):
            shard, sample = self.names[self.shards[at[index]]], self.samples[at[index]]
            yield int(index), f"{shard}, sample {sample}"


def check_shard(task: ShardTask, tell: Tell) -> ShardReport:
    """Checks a shard's size and hashes, and reads and decodes all that it holds.

    It is for an `Engine`, and has nothing to tell before it is done.

    Raises:
        StoreError: If the store, or the local disk, cannot be used.
    """
    del tell
    report = ShardReport(task)
    try:
        _check_file(task, report)
    except TooLargeError:
        report.add(
            f"more than the {task.shard.bytes} bytes that the index says: its "
            f"{task.shard.samples} samples were not read"
        )
        return report
    if task.held_out is not None:
        for index, place in HeldOut.load(task.held_out).find(report.digests):
            report.add(f"its image is held out as well: {place}", int(report.samples[index]))
    return report


def _check_file(task: ShardTask, report: ShardReport) -> None:
    with _local_file(task) as path:
        size = path.stat().st_size
        if size != task.shard.bytes:
            report.add(
                f"{size} bytes, and the index says {task.shard.bytes}: its "
                f"{task.shard.samples} samples were not read"
            )
            return
        with path.open("rb") as file:
            _check_hashes(file, report)
            _check_samples(file, report)


@cache
def _store(place: str) -> Store:
    return open_store(place)


@contextmanager
def _local_file(task: ShardTask) -> Iterator[Path]:
    if "://" not in task.place:
        yield Path(task.place, task.shard.name)
        return
    with tempfile.TemporaryDirectory(dir=task.staging) as folder:
        path = Path(folder, "shard.mds")
        ride_out(
            lambda: _store(task.place).get(task.shard.name, path, task.shard.bytes),
            f"download {task.place}/{task.shard.name}",
            _PATIENCE,
        )
        yield path


def _check_hashes(file: BinaryIO, report: ShardReport) -> None:
    expected = report.task.shard.entry.raw.hashes
    hashes: dict[str, Any] = {"xxh64": xxhash.xxh64()}
    if "sha1" in expected:  # of data sets of before
        hashes["sha1"] = hashlib.sha1(usedforsecurity=False)
    while chunk := file.read(_CHUNK_BYTES):
        for digest in hashes.values():
            digest.update(chunk)
    if wrong := [name for name, found in hashes.items() if found.hexdigest() != expected[name]]:
        differ = "differs" if len(wrong) == 1 else "differ"
        report.add(f"its {' and its '.join(wrong)} {differ} from the index")


def _check_samples(file: BinaryIO, report: ShardReport) -> None:
    shard = report.task.shard
    offsets = _offsets(file, shard)
    if isinstance(offsets, str):
        report.add(f"{offsets}: its {shard.samples} samples were not read")
        return
    digests, samples = [], []
    for sample, (begin, end) in enumerate(pairwise(offsets)):
        file.seek(begin)
        try:
            record = decode_record(file.read(int(end) - int(begin)))
        except ValueError as error:
            report.add(f"it cannot be decoded: {type(error).__name__}: {error}", sample)
            continue
        digests.append(xxhash.xxh3_128_digest(record["image"]))
        samples.append(sample)
        for fault in _record_faults(record):
            report.add(fault, sample, record["id"])
    report.digests = np.array(digests, DIGEST)
    report.samples = np.array(samples, np.int64)


def _offsets(file: BinaryIO, shard: Shard) -> NDArray[np.uint32] | str:
    """Where each sample begins, and the last one ends; or what is wrong with that table."""
    file.seek(0)
    head = file.read(4 * (2 + shard.samples))
    count = struct.unpack("<I", head[:4])[0] if len(head) >= 4 else None
    if count != shard.samples:
        return f"it says that it holds {count} samples, and the index says {shard.samples}"
    offsets = np.frombuffer(head, "<u4", offset=4)
    if len(offsets) != count + 1 or offsets[-1] != shard.bytes or offsets[0] < len(head):
        return "its table of samples does not fit its size"
    if not (offsets[:-1] < offsets[1:]).all():
        return "its table of samples is out of order"
    return offsets


def _record_faults(record: Record) -> Iterator[str]:
    """What training would meet in a record."""
    placeholders = record["prompt"].count(IMAGE_PLACEHOLDER)
    if placeholders != 1:
        yield f"its prompt has {placeholders} × {IMAGE_PLACEHOLDER}, not one"
    if not record["answer"].strip():
        yield "its answer is empty"
    if IMAGE_PLACEHOLDER in record["answer"]:
        yield f"its answer holds {IMAGE_PLACEHOLDER}"
    try:
        check_image(record["image"])
    except Rejected as rejected:
        yield str(rejected)
