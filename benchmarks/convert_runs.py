"""The conversions that `convert.py` measures, and what they are measured against."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gate import Clock
from convert import convert_pairs
from convert.engine import LocalEngine, Tell
from convert.images import check_image
from convert.mds import HASHES
from convert.sources import LlavaJson
from vlm_composer.data.schema import MDS_COLUMNS

SHARD_BYTES = 1 << 26


def timed(run: Callable[[], Any]) -> Clock:
    """How long something takes; what others left to be written to the disk is written first."""
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
    shutil.rmtree(folder / "out", ignore_errors=True)
    convert_pairs([source], folder / "out", workers=workers, show_progress=False, **settings)


def plain_loop(folder: Path, check: bool) -> None:
    """A loop as in streaming's own examples, which know of no bad image.

    Args:
        folder: Of `write_photos`.
        check: Decode every image, as the product does.
    """
    from streaming import MDSWriter

    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    items = json.loads((folder / "pairs.json").read_bytes())
    with MDSWriter(
        columns=dict(MDS_COLUMNS), out=str(out), hashes=HASHES, size_limit=SHARD_BYTES
    ) as writer:
        for item in items:
            image = (folder / "images" / item["image"]).read_bytes()
            if check:
                check_image(image)
            human, gpt = item["conversations"]
            writer.write(
                {"id": item["id"], "image": image, "prompt": human["value"], "answer": gpt["value"]}
            )


def decode(images: Iterable[bytes]) -> None:
    """The part that nobody can leave out who wants to know that an image decodes."""
    for image in images:
        check_image(image)


def decode_side_by_side(folder: Path, count: int) -> float:
    """How much more two processes decode than one: what this machine lets two workers do."""
    paths = sorted((folder / "images").rglob("*.jpg"))[:count]
    parts = [paths[start::8] for start in range(8)]
    alone, together = (
        timed(lambda w=workers: list(LocalEngine(w).map(_decode_files, parts))).wall
        for workers in (1, 2)
    )
    return alone / together


def _decode_files(paths: list[Path], tell: Tell) -> None:
    del tell
    decode(path.read_bytes() for path in paths)


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
