"""How fast one worker reads, decodes and collates, against a loop that only decodes."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.faithful_towers import Shape, read_yaml, training_yaml
from vlm_composer.data.images import decode_image
from vlm_composer.train import prepare


def compare_loading(
    connection: Connection, shape: Shape, towers: Path, data: Path, out: Path, size: int
) -> None:
    """At every order, send the loader's speed as a share of the loop's: (by CPU, by wall time).

    The loop is `decode_image` over the bytes of the same images, in one thread. The loader is the
    one that the product builds, with one worker process; its first batch, which opens the epoch, is
    left out.
    """
    worker = {"dataset": {"local": str(data / "mds" / "train")}, "num_workers": 1}
    path = training_yaml(shape, towers, data, out / "run.yaml", size, train_loader=worker)
    trainer = prepare(read_yaml(path))
    loader = trainer.state.train_dataloader
    assert loader is not None
    items = json.loads((data / "pairs.json").read_text())
    images = [(data / "images" / item["image"]).read_bytes() for item in items]
    for _ in loader:  # starts the worker and reads the shards into the page cache
        pass
    while _is_asked(connection):
        started, cpu = time.perf_counter(), time.process_time()
        for image in images:
            decode_image(image, shape.image_size)
        loop_wall = (time.perf_counter() - started) / len(images)
        loop_cpu = (time.process_time() - cpu) / len(images)

        batches = iter(loader)
        next(batches)
        started, cpu = time.perf_counter(), _workers_cpu()
        samples = sum(size for _ in batches)
        wall, cpu = (time.perf_counter() - started) / samples, (_workers_cpu() - cpu) / samples
        connection.send((loop_cpu / cpu, loop_wall / wall))
    trainer.close()


def _is_asked(connection: Connection) -> bool:
    try:
        connection.recv()
    except EOFError:
        return False
    return True


def _workers_cpu() -> float:
    """Seconds that this process's children have computed, by the kernel's count."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return ticks / os.sysconf("SC_CLK_TCK")
