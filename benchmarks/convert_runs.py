"""The conversions that `convert.py` measures, and what they are measured against."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from benchmarks.gate import Clock
from convert import convert_pairs
from convert.engine import LocalEngine, Tell
from convert.images import check_image
from convert.mds import HASHES
from convert.sources import LlavaJson
from vlm_composer.data.schema import MDS_COLUMNS

SHARD_BYTES = 1 << 26

_SAME_PLACE = 256
"""Images that are decoded, about, with buffers in the same places."""


def timed(run: Callable[[], Any], folder: Path) -> Clock:
    """How long something takes; what others left is deleted, or written to the disk, first."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    clock = Clock()
    clock.start()
    run()
    clock.stop()
    return clock


def ours(folder: Path, workers: int, **settings: Any) -> None:
    """The product, on pairs.json or pairs.jsonl and their images."""
    json_path = folder / "pairs.json"
    images = folder / "images"
    if not json_path.exists():
        json_path, images = folder / "pairs.jsonl", folder / "images.tar"
    source = LlavaJson(json_path, images, max_image_bytes=SHARD_BYTES)
    settings = {"show_progress": False, "overwrite": True, **settings}
    convert_pairs([source], folder / "out", workers=workers, **settings)


def plain_loop(folder: Path, check: bool) -> None:
    """A loop as in streaming's own examples, which know of no bad image.

    Args:
        folder: Of `write_photos`.
        check: Decode every image with Pillow, as who looks for broken ones would.
    """
    from streaming import MDSWriter

    items = json.loads((folder / "pairs.json").read_bytes())
    with MDSWriter(
        columns=dict(MDS_COLUMNS),
        out=str(folder / "out"),
        hashes=HASHES,
        size_limit=SHARD_BYTES,
        exist_ok=True,
    ) as writer:
        for item in items:
            image = (folder / "images" / item["image"]).read_bytes()
            if check:
                _decode_in_full(image)
            human, gpt = item["conversations"]
            writer.write(
                {"id": item["id"], "image": image, "prompt": human["value"], "answer": gpt["value"]}
            )


def decode(images: Sequence[bytes]) -> None:
    """Decode every image in full, as training does: what a conversion's speed is held against.

    Where libjpeg's buffers happen to lie in memory makes it up to a sixth faster or slower, for as
    long as nothing else takes memory. So something is taken now and then, as where files are read.
    """
    draw = random.Random(len(images))
    for start in range(0, len(images), _SAME_PLACE):
        taken = [bytes(draw.randrange(1 << 16)) for _ in range(draw.randrange(16))]
        for image in images[start : start + _SAME_PLACE]:
            _decode_in_full(image)
        del taken


def _decode_in_full(image: bytes) -> None:
    with Image.open(BytesIO(image)) as picture:
        picture.load()


@contextmanager
def decoding_watched() -> Iterator[Clock]:
    """Measure how long conversions of this process decode; yields the sum, of one thread."""
    clock = Clock()

    def watched(image: bytes) -> tuple[int, int]:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return check_image(image)
        finally:
            clock.wall += time.perf_counter() - wall
            clock.cpu += time.thread_time() - cpu

    with mock.patch("convert.record.check_image", watched):
        yield clock


def decode_side_by_side(folder: Path, count: int) -> float:
    """How much more two processes decode than one: what this machine lets two workers do."""
    paths = sorted((folder / "images").rglob("*.jpg"))[:count]
    parts = [paths[start::8] for start in range(8)]
    alone, together = (
        timed(lambda w=workers: list(LocalEngine(w).map(_decode_files, parts)), folder).wall
        for workers in (1, 2)
    )
    return alone / together


def _decode_files(paths: list[Path], tell: Tell) -> None:
    del tell
    decode([path.read_bytes() for path in paths])


def start_server() -> None:
    """Start the server that workers are forked from, which takes seconds, once."""
    list(LocalEngine(2).map(partial(_nothing), range(2)))


def _nothing(task: int, tell: Tell) -> None:
    del task, tell


@dataclass
class Usage:
    """What a conversion took, with its workers."""

    wall: float = 0.0
    cpu: float = 0.0
    """Of this process and its descendants."""

    parent_mib: float = 0.0
    """Most that was resident in this process."""

    worker_mib: float = 0.0
    """Most that was resident in a worker."""

    _seen: dict[int, tuple[float, float]] = field(default_factory=dict)


@contextmanager
def measured() -> Any:
    """Watch this process and its descendants; yields a `Usage` that is filled in at the end.

    The kernel keeps each process's most resident memory and its CPU time; they are read ten times a
    second, for a process that ends takes them along.
    """
    usage, ended = Usage(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            _look(usage)

    before = _descendants()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    _look(usage)
    start = {**usage._seen}
    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    try:
        yield usage
    finally:
        usage.wall = time.perf_counter() - started
        ended.set()
        thread.join()
        _look(usage)
        usage.cpu = sum(cpu - start.get(pid, (0, 0))[0] for pid, (cpu, _) in usage._seen.items())
        usage.parent_mib = usage._seen[os.getpid()][1]
        workers = [
            mib for pid, (_, mib) in usage._seen.items() if pid not in {os.getpid(), *before}
        ]
        usage.worker_mib = max(workers, default=0.0)


def _look(usage: Usage) -> None:
    for pid in [os.getpid(), *_descendants()]:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
        if found:
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            usage._seen[pid] = cpu, int(found[0]) / 1024


def _descendants() -> list[int]:
    found = [os.getpid()]
    for pid in found:
        try:
            tasks = [*Path(f"/proc/{pid}/task").iterdir()]
            found += [int(c) for task in tasks for c in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found[1:]
