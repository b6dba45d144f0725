"""Claim: a second rank costs next to nothing: what travels is the connector's gradients.

Weak scaling on one machine: each rank has one thread and the same work, a micro-batch of 4. Four
kinds of runs take turns: one rank alone; two runs at once that know nothing of each other, for they
share the machine's memory and clock; two ranks that replicate; two that shard. Samples differ in
length, and ranks wait for the slowest at each step, whatever connects them: what two unconnected
runs would do if they waited so is what `replicate` is held against. What is left is the cost of the
connection. How it grows beyond, `python -m vlm_composer.plan` computes.

    python benchmarks/weak_scaling.py [--quick] [--json FILE]

Prints a table and exits 1 where a row falls short. Needs two cores with nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # for every process
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.faithful_towers import (
    FAITHFUL,
    TINY,
    training_yaml,
    write_pairs,
    write_towers,
)
from benchmarks.launched_run import LaunchedRun
from benchmarks.throughput_rows import Row

MICROBATCH = 4
"""Of a rank."""
WARM_UP = 3
"""Steps that compile and are left out."""
KINDS = ("alone", "unconnected", "replicate", "shard")
IN_STEP = "in step"
"""What the unconnected runs would do, if both waited for the slower at each step."""


class Bench:
    """Towers and pairs in a folder, and the runs over them.

    Args:
        folder: An empty folder.
        quick: Tiny towers and few steps.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.steps = folder, 4 if quick else 10
        self.shape = TINY if quick else FAITHFUL
        self.data, self.towers = folder / "data", folder / "towers"
        self.data.mkdir()
        write_pairs(self.data, 2 * MICROBATCH * (WARM_UP + self.steps))
        write_towers(self.shape, self.towers)

    def speeds(self, kind: str, turn: int) -> list[list[float]]:
        """Samples/s of each run of one kind, all its ranks together, at each measured step."""
        ranks = 2 if kind in ("replicate", "shard") else 1
        runs = [
            LaunchedRun(
                training_yaml(
                    self.shape,
                    self.towers,
                    self.data,
                    self.folder / f"{kind}-{turn}-{number}.yaml",
                    MICROBATCH,
                ),
                self.folder / f"{kind}-{turn}-{number}-logs",
                ranks,
                threads=1,
                overrides={
                    "global_train_batch_size": MICROBATCH * ranks,
                    "max_duration": f"{WARM_UP + self.steps}ba",
                    "parallelism": kind if ranks == 2 else "replicate",
                    "cache_prompts": False,  # shards know no cache, and all should do the same
                },
            )
            for number in range(2 if kind == "unconnected" else 1)
        ]
        return [run.metrics()["throughput/samples_per_sec"][-self.steps :] for run in runs]


def rate(speeds: list[list[float]]) -> float:
    """Samples/s of runs that know nothing of each other: the sum of their medians."""
    return sum(map(statistics.median, speeds))


def rate_in_step(speeds: list[list[float]]) -> float:
    """Samples/s of two such runs, were each step of both as long as the slower's.

    Their samples are the same, so that a step of one is held against the next of the other.
    """
    first, second = speeds
    pairs = zip(first, second[1:] + second[:1], strict=True)
    return statistics.median(2 * min(pair) for pair in pairs)


def main() -> int:
    """Measure, print the table, and say whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny towers; nothing is judged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    rates: dict[str, list[float]] = {kind: [] for kind in (*KINDS, IN_STEP)}
    with tempfile.TemporaryDirectory(prefix="weak-scaling-") as folder:
        bench = Bench(Path(folder), args.quick)
        for turn in range(1 if args.quick else 3):
            for kind in KINDS:
                print(f"{time.strftime('%H:%M:%S')} {kind}, turn {turn + 1}", file=sys.stderr)
                speeds = bench.speeds(kind, turn)
                rates[kind].append(rate(speeds))
                if kind == "unconnected":
                    rates[IN_STEP].append(rate_in_step(speeds))

    def row(name: str, kind: str, of: str, factor: float, bound: float) -> Row:
        pairs = zip(rates[kind], rates[of], strict=True)
        return Row(name, bound, values={"wall": [a / (factor * b) for a, b in pairs]})

    rows = [
        row("two ranks, replicate, of two runs in step", "replicate", IN_STEP, 1, 0.95),
        row("two runs in step, of two unconnected runs", IN_STEP, "unconnected", 1, 0),
        row("two ranks, shard, of two unconnected runs", "shard", "unconnected", 1, 0),
        row("two unconnected runs, of twice one alone", "unconnected", "alone", 2, 0),
        row("two ranks, replicate, of twice one alone", "replicate", "alone", 2, 0),
    ]
    for line in (line for r in rows for line in r.lines(enforced=r.bound > 0 and not args.quick)):
        print(line)
    for kind, values in rates.items():
        print(f"       {kind:<14}{statistics.median(values):8.2f} samples/s")
    if args.json:
        args.json.write_text(json.dumps({"samples/s": rates}, indent=2) + "\n")
    return 0 if args.quick or all(r.ok for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
