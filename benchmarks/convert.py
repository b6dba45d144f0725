"""Claim: a conversion takes hardly longer than decoding its images once, uses every core, and costs
the same a record, in time and in memory, for a thousand records and for a million.

    python benchmarks/convert.py [--quick] [--json FILE]

Prints a table and exits 1 where a row falls short.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# First, for in the folder of this file `convert` is this file.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.convert_inputs import write_photos, write_small
from benchmarks.convert_runs import (
    Usage,
    decode,
    decode_side_by_side,
    decoding_watched,
    measured,
    ours,
    plain_loop,
    start_server,
    timed,
)
from benchmarks.gate import Clock
from benchmarks.throughput_rows import Row, both


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    photos: int = 12_288
    """Twelve partitions of the least size, so that two workers have as much to do, for long enough
    that it does not matter that each of the two passes starts them (0.1 s)."""

    decoded: int = 2048
    rounds: int = 5
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)


QUICK = Effort(photos=64, decoded=64, rounds=1, sizes=(3_000, 10_000))


class Bench:
    """Pairs in a folder, and the rows measured with them.

    Args:
        folder: An empty folder.
        effort: How much to measure.
    """

    def __init__(self, folder: Path, effort: Effort) -> None:
        self._folder, self._effort = folder, effort
        self.facts: dict[str, Any] = {}

    def photos(self) -> list[Row]:
        """The rows about photos: contenders take turns, and a round gives one figure."""
        folder, effort = self._folder / "photos", self._effort
        folder.mkdir()
        tell(f"writing {effort.photos} photos")
        write_photos(folder, effort.photos)
        paths = sorted((folder / "images").rglob("*.jpg"))[: effort.decoded]
        images = [path.read_bytes() for path in paths]
        alone = partial(decode, images)
        contenders = {
            "one worker": partial(ours, folder, 1),
            "two workers": partial(ours, folder, 2),
            "one worker, no eval side": partial(ours, folder, 1, eval_ratio=0),
            "MDSWriter loop that decodes": partial(plain_loop, folder, check=True),
            "MDSWriter loop": partial(plain_loop, folder, check=False),
        }
        start_server()
        for run in (alone, *contenders.values()):  # imports, and all files in the page cache
            run()
        clocks: dict[str, list[Clock]] = {name: [] for name in contenders}
        decoding = [timed(alone, folder)]
        scaling, beside = [], []
        for number in range(effort.rounds):
            tell(f"round {number + 1} of {effort.rounds}")
            for name, run in contenders.items():
                clocks[name].append(timed(run, folder))
                if name == "one worker":
                    decoding.append(timed(alone, folder))
            scaling.append(decode_side_by_side(folder, effort.decoded))
            with decoding_watched() as watched:
                whole = timed(contenders["one worker"], folder)
            beside.append((watched.cpu / whole.cpu, watched.wall / whole.wall))
            decoding.append(timed(alone, folder))
        self.facts["two processes that only decode, by one"] = statistics.median(scaling)
        for unit, shares in zip(("CPU", "wall"), zip(*beside, strict=True), strict=True):
            fact = f"one worker, share of its {unit} time within check_image"
            self.facts[fact] = statistics.median(shares)
        self.facts["decoding alone, records/s"] = len(images) / statistics.median(
            clock.wall for clock in decoding
        )
        for name, times in clocks.items():
            seconds = statistics.median(clock.wall for clock in times)
            self.facts[f"{name}, records/s"] = effort.photos / seconds
        self.facts["bytes of a photo"] = statistics.mean(map(len, images))
        shutil.rmtree(folder)

        one, two = clocks["one worker"], clocks["two workers"]
        share = effort.photos / len(images)
        around = [
            Clock(share * (a.wall + b.wall) / 2, share * (a.cpu + b.cpu) / 2)
            for a, b in zip(decoding[::2], decoding[1::2], strict=False)
        ][: len(one)]
        plain = clocks["one worker, no eval side"]
        loop, decoding_loop = clocks["MDSWriter loop"], clocks["MDSWriter loop that decodes"]
        walls = [o.wall / t.wall for o, t in zip(one, two, strict=True)]
        return [
            Row("two workers × one", 1.8, values={"wall": walls}),
            Row("one worker, of the rate of decoding alone", 0.85, values=ratios(around, one)),
            Row("× MDSWriter loop that decodes", 1.0, values=ratios(decoding_loop, plain)),
            Row("× MDSWriter loop that does not", 0.0, values=ratios(loop, plain)),
        ]

    def sizes(self) -> list[Row]:
        """The rows about small pictures in growing numbers, each size converted once."""
        sizes, used = self._effort.sizes, {}
        for size in sizes:
            folder = self._folder / f"small-{size}"
            folder.mkdir()
            tell(f"writing {size:,} small pictures")
            write_small(folder, size)
            tell(f"converting {size:,}")
            start_server()
            with measured() as usage:
                ours(folder, 2)
            used[size] = usage
            shutil.rmtree(folder)
            self.facts[f"{size:,} small pictures"] = {
                "µs a record": usage.wall / size * 1e6,
                "µs of CPU": usage.cpu / size * 1e6,
                "MiB of the parent": usage.parent_mib,
                "MiB of a worker": usage.worker_mib,
            }
        return [*self._growth(used)]

    def _growth(self, used: dict[int, Usage]) -> list[Row]:
        *smaller, largest = used
        last = used[largest]
        time_rows = [
            Row(
                f"time a record, {largest:,} by {size:,}",
                1.2,
                at_most=True,
                values=both(
                    [last.cpu / largest / (used[size].cpu / size)],
                    [last.wall / largest / (used[size].wall / size)],
                ),
            )
            for size in smaller
        ]
        size = smaller[-1]
        memory = {
            "parent": [last.parent_mib / used[size].parent_mib],
            "worker": [last.worker_mib / used[size].worker_mib],
        }
        return [*time_rows, Row(f"peak memory, {largest:,} by {size:,}", 1.2, True, memory)]


def ratios(theirs: list[Clock], ours: list[Clock]) -> dict[str, list[float]]:
    """Their time by ours, round by round."""
    pairs = list(zip(theirs, ours, strict=True))
    return both([t.cpu / o.cpu for t, o in pairs], [t.wall / o.wall for t, o in pairs])


def tell(text: str) -> None:
    """Say what takes long, with the time it began."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few records: shows that it works, enforces no bound"
    )
    parser.add_argument("--json", type=Path, help="also write rows and facts to this file")
    parser.add_argument("--only", choices=("photos", "sizes"), help="part of the rows")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="convert-bench-") as folder:
        bench = Bench(Path(folder), QUICK if options.quick else Effort())
        rows = bench.photos() if options.only != "sizes" else []
        rows += bench.sizes() if options.only != "photos" else []
    for row in rows:
        print("\n".join(row.lines(enforced=not options.quick)))
    for name, fact in bench.facts.items():
        if isinstance(fact, dict):
            text = ", ".join(f"{key} {value:.4g}" for key, value in fact.items())
        else:
            text = f"{fact:.4g}"
        print(f"{name}: {text}")
    failed = sum(not row.ok for row in rows)
    seconds = round(time.monotonic() - started)
    if options.quick:
        print(f"few records: no row has to hold; {seconds} s")
    else:
        print(f"{len(rows) - failed} of {len(rows)} rows hold what is promised; {seconds} s")
    if options.json:
        report = {"facts": bench.facts, "rows": [{**asdict(row), "ok": row.ok} for row in rows]}
        options.json.write_text(json.dumps(report, indent=1))
    return 1 if failed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
