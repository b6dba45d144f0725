"""The rows of `throughput.py`'s table, made of what the contenders report."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from benchmarks.gate import Chunk

LOSSES_APART = 0.02
"""How far the losses of both trainings may be apart at a step, of the larger; bf16 rounds."""


@dataclass
class Row:
    """One claim."""

    name: str
    bound: float
    at_most: bool = False
    """Whether the bound is the most it may be, not the least."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """Every pair's figure, by what it was measured in."""

    @property
    def ok(self) -> bool:
        """Whether every median holds."""
        return all(
            (m <= self.bound) if self.at_most else (m >= self.bound)
            for m in map(statistics.median, self.values.values())
        )

    def lines(self, *, enforced: bool) -> list[str]:
        """Lines of the table, with a verdict where the bound is enforced."""
        sign = "≤" if self.at_most else "≥"
        texts = []
        for index, (unit, values) in enumerate(self.values.items()):
            name = self.name if index == 0 else ""
            bound = f"{sign} {self.bound:.3g}" if index == 0 else ""
            verdict = ("ok" if self.ok else "FAILS") if index == 0 and enforced else ""
            texts.append(
                f"{verdict:<6}{name:<50}{bound:>7}  {unit:<7}{statistics.median(values):7.3g}"
                f"  [{min(values):.3g}–{max(values):.3g}]  n={len(values)}"
            )
        return texts


def both(cpu: list[float], wall: list[float]) -> dict[str, list[float]]:
    """A row's values by CPU time and by wall time."""
    return {"cpu": cpu, "wall": wall}


def speed_row(name: str, floor: float, theirs: list[Chunk], ours: list[Chunk]) -> Row:
    """Their time by ours, for every pair of turns over the same samples."""
    pairs = list(zip(theirs, ours, strict=True))
    cpu = [t.time.cpu / o.time.cpu for t, o in pairs]
    wall = [t.time.wall / o.time.wall for t, o in pairs]
    return Row(name, floor, values=both(cpu, wall))


def overhead_row(pairs: list[Chunk]) -> Row:
    """Composer's step without its wait for the loader, above a bare step on the same batch."""
    cpu = [(c.time.cpu - c.loading.cpu) / c.bare.cpu - 1 for c in pairs]
    wall = [(c.time.wall - c.loading.wall) / c.bare.wall - 1 for c in pairs]
    name = "Composer's overhead a step, micro-batch 4"
    return Row(name, 0.03, at_most=True, values=both(cpu, wall))


def losses_row(chunks: dict[str, list[Chunk]], sizes: tuple[int, ...]) -> Row:
    """That both sides did train on the same samples, step by step."""
    apart = []
    for size in sizes:
        theirs, ours = (
            [loss for chunk in chunks[f"{who} {size}"] for loss in chunk.losses]
            for who in ("HF", "ours")
        )
        apart += [abs(t - o) / max(t, o) for t, o in zip(theirs, ours, strict=True)]
    return Row("farthest that losses are apart", LOSSES_APART, True, {"loss": [max(apart)]})
