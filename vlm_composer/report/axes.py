"""Where the points of a chart lie, how its axes are cut, and which of many points are drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 260
"""Units of the drawing; on a phone, where it is 330 pixels wide, its text is still legible."""
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 40
MAX_POINTS = 240
"""Points of a line that are drawn; of more, the least and greatest of each stretch."""
LOG_ABOVE = 50
"""Ratio of greatest to least value above which the axis is logarithmic."""


@dataclass(frozen=True)
class Scale:
    """Where values lie on an axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        bent = math.log10 if self.log else float
        low, high = bent(self.low), bent(self.high)
        share = (bent(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values between low and high, at most eight."""
        if not self.log:
            return even_ticks(self.low, self.high)
        powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        decades = [10.0**power for power in powers]
        return decades[:: -(-len(decades) // 6)] if len(decades) > 1 else [self.low, self.high]


def even_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 × a power of ten between two values."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def decimate(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Keep the shape of a line in fewer points: of each stretch its least and its greatest.

    Args:
        points: In order of batches; values may be NaN or infinite, of which each stretch keeps one.
        most: Points to keep, about.
    """
    if len(points) <= most:
        return list(points)
    stretch = -(-len(points) // (most // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [point for point in part if math.isfinite(point[1])]
        chosen = {part.index(p) for p in part if not math.isfinite(p[1])}
        chosen = {min(chosen)} if chosen else set()
        if finite:
            chosen |= {part.index(min(finite, key=lambda p: p[1]))}
            chosen |= {part.index(max(finite, key=lambda p: p[1]))}
        if start == 0:
            chosen.add(0)
        if start + stretch >= len(points):
            chosen.add(len(part) - 1)
        kept += [part[index] for index in sorted(chosen)]
    return kept


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """The mean of the last `window` finite values, at each point."""
    finite = [point for point in points if math.isfinite(point[1])]
    sums = list(itertools.accumulate((y for _, y in finite), initial=0.0))
    return [
        (x, (sums[place + 1] - sums[max(place + 1 - window, 0)]) / min(place + 1, window))
        for place, (x, _) in enumerate(finite)
    ]


def across(batches: Sequence[float]) -> Scale:
    """Lay out the horizontal axis; of a single batch with room around it."""
    low, high = min(batches), max(batches)
    if low == high:
        low, high = low - 1, high + 1
    return Scale(low, high, LEFT, WIDTH - RIGHT)


def upward(values: Sequence[float], from_zero: bool, log: bool | None = None) -> Scale:
    """Lay out the vertical axis.

    Args:
        values: Finite ones; may be none.
        from_zero: Whether it begins at 0.
        log: Whether it is logarithmic; None decides by the values.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log is None:
        log = low > 0 and high / low > LOG_ABOVE
    if log:
        return Scale(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    # A flat line, or one whose differences are rounding, gets a height as well.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) / 10 or 1.0
        low, high = (low if from_zero else low - room), high + room
    room = (high - low) * 0.05
    return Scale(low if from_zero and low == 0 else low - room, high + room, HEIGHT - BOTTOM, TOP)
