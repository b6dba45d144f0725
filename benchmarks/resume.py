"""Claim: a run that is killed, preempted or cut off from its store ends as if nothing had happened.

Every row is a real run of `vlm_composer/train.py` through the Composer launcher, with tiny towers,
two loader workers, accumulation, shuffling, evaluations in the middle of epochs, and shards and
checkpoints in a real S3 server, Google Cloud Storage emulator or Azurite. It is disturbed, started
again with the same command and compared with an undisturbed run: every loss, learning rate and
sample, and the final weights, moments and random state.

    python benchmarks/resume.py [--world-size 1 2] [--quick] [--json FILE]

Prints a table and exits 1 where a row falls short.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.disturbed_runs import SERVERS, Bench, StoreServer
from benchmarks.resume_rows import EPOCH, Row, conclude

Disturbance = Callable[[Bench, Row], Row]


def matrix(world_sizes: list[int], quick: bool) -> Iterator[tuple[Row, Disturbance]]:
    """The rows, each with what to do for it."""
    everything = f"tree:{EPOCH + 3}"
    moments = {
        "before the first checkpoint": "0:2:after_forward",
        "in the middle of an epoch": "0:6:after_train_batch",
        "at an epoch's last batch": f"0:{EPOCH}:batch_end",
        "at an epoch's end": f"0:{EPOCH}:epoch_checkpoint",
        "in the second epoch": f"0:{EPOCH + 6}:batch_start",
        "with all its processes": everything,
    }
    ways = [(n, "replicate") for n in world_sizes] + [(n, "shard") for n in world_sizes if n > 1]
    for ranks, parallelism in ways:
        label = f"{parallelism} {ranks}" if ranks > 1 else "one process"
        for moment, where in moments.items():
            if not quick or (ranks == 1 and where == everything):
                row = Row(f"kill {moment}, {label}", (ranks, ranks), (parallelism, parallelism))
                yield row, lambda bench, row, where=where: bench.kill(row, where)
        if not quick or parallelism == "shard":
            row = Row(f"SIGTERM, {label}", (ranks, ranks), (parallelism, parallelism))
            yield row, lambda bench, row: bench.preempt(row, EPOCH + 2)
    changes = [
        ((1, n), ("replicate", parallelism)) for n, parallelism in ways if n > 1 and not quick
    ]
    changes += [((n, 1), (parallelism, "replicate")) for n, parallelism in ways if n > 1]
    for ranks, parallelisms in changes[:1] if quick else changes:
        name = f"kill, {parallelisms[0]} {ranks[0]} then {parallelisms[1]} {ranks[1]}"
        row = Row(name, ranks, parallelisms, exact=False)
        yield row, lambda bench, row: bench.kill(row, everything)
    outages: list[float | None] = [1, None] if quick else [1, 8, 30, None]
    one = ((1, 1), ("replicate", "replicate"))
    for seconds in outages:
        name = f"store away for {seconds:.0f} s" if seconds else "store away for good"
        yield Row(name, *one), lambda bench, row, seconds=seconds: bench.outage(row, 3, seconds)
    for store in ("gs", "azure"):
        row = Row(f"kill with all its processes, {store}://", *one, store=store)
        yield row, lambda bench, row: bench.kill(row, everything)
    if not quick:
        row = Row("store away for 8 s while saving", *one)
        yield row, lambda bench, row: bench.outage(row, 3, 8, reading=False)
        row = Row("store away for good while saving", *one)
        yield row, lambda bench, row: bench.outage(row, 3, None, reading=False)
        for store in ("gs", "azure"):
            row = Row(f"store away for 8 s, {store}://", *one, store=store)
            yield row, lambda bench, row: bench.outage(row, 3, 8)
        row = Row("200 batches killed ten times", *one, batches=200)
        yield row, lambda bench, row: bench.kill_often(row, 10)


def run(world_sizes: list[int], quick: bool, folder: Path) -> list[Row]:
    """Run the matrix, printing each row as it is done."""
    servers: dict[str, StoreServer] = {}
    for scheme, kind in SERVERS.items():
        (folder / f"{scheme}-server").mkdir()
        servers[scheme] = kind(folder / f"{scheme}-server")
        os.environ.update(servers[scheme].env)
        servers[scheme].start()
    rows = []
    try:
        benches = {scheme: Bench(folder / scheme, server) for scheme, server in servers.items()}
        for row, disturb in matrix(world_sizes, quick):
            try:
                done = disturb(benches[row.store], row)
            except RuntimeError as error:
                row.faults.append(str(error))
                done = row
            rows.append(done)
            print_row(done)
    finally:
        for server in servers.values():
            server.kill()
    return rows


def print_row(row: Row) -> None:
    """Print a line of the table, and what is wrong below it."""
    verdict = "ok" if row.ok else "FAILS"
    kind = "bitwise" if row.bitwise else f"losses to {row.loss_error:.0e}"
    print(
        f"{verdict:<6} {row.name:<55} {kind:<17} {row.samples_lost_or_repeated:>3} lost or repeated"
        f"  {row.seconds_to_new_batch:5.1f} s to a new batch  {row.checkpoint_bytes / 1e3:7.1f} kB",
        flush=True,
    )
    for fault in row.faults:
        print(f"       {fault}", flush=True)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, nargs="+", default=[1, 2], help="ranks to run on")
    parser.add_argument("--quick", action="store_true", help="a few rows of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the ten points of killing")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    random.seed(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="resume-"))
    return conclude(run(options.world_size, options.quick, folder), folder, options.json)


if __name__ == "__main__":
    sys.exit(main())
