"""Charts as inline SVG: axes, ticks, legend, a tooltip at points, and a text that says the same.

Colours are classes, which the page's style sheet fills in, for light, dark and paper. Lines are
dashed apart as well, for who cannot tell the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlm_composer.report.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Points,
    Scale,
    across,
    decimate,
    upward,
)
from vlm_composer.report.text import escape, number

MAX_TOOLTIPS = 40
MAX_BARS = 40


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Points
    faint: bool = False
    """Drawn pale behind the others."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    level: tuple[str, float] | None = None,
    from_zero: bool = False,
    explain: str = "",
) -> str:
    """Draw lines over batches.

    Args:
        title: What is shown.
        series: At least one with a point.
        unit: Of the values.
        level: A value to compare with, and its name: a dashed horizontal line.
        from_zero: Whether the axis begins at 0.
        explain: A sentence on how to read it.

    Returns:
        A `<figure>`.
    """
    values = [y for each in series for _, y in each.points if math.isfinite(y)]
    batches = [x for each in series for x, _ in each.points]
    if level is not None:
        values.append(level[1])
    y_scale = upward(values, from_zero)
    x_scale = across(batches)
    marks = [_axes(x_scale, y_scale, unit)]
    if level is not None:
        y = y_scale(level[1])
        marks.append(f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    for index, each in enumerate(series):
        marks.append(_line(each, index, x_scale, y_scale, unit))
    legend = [
        (f"line s{i}" + (" faint" if s.faint else ""), s.name) for i, s in enumerate(series)
    ] + ([("line level", f"{level[0]} ({number(level[1])})")] if level else [])
    summary = " ".join(_told(each, unit) for each in series if not each.faint or len(series) == 1)
    return _figure(title, "".join(marks), legend, summary, explain)


def stacked_chart(
    title: str, parts: Mapping[str, Points], *, unit: str = "", explain: str = ""
) -> str:
    """Draw bars over batches, each stacked from parts.

    Args:
        title: What is shown.
        parts: For each part its values; a batch that a part lacks counts as 0, as does a value that
            is not finite.
        unit: Of the values.
        explain: A sentence on how to read it.

    Returns:
        A `<figure>`.
    """
    batches = sorted({x for points in parts.values() for x, _ in points})
    kept = [dict(points) for points in parts.values()]
    groups = [batches[i : i + -(-len(batches) // MAX_BARS)] for i in _starts(len(batches))]
    bars = [[_mean([part.get(x, 0.0) for x in group]) for part in kept] for group in groups]
    y_scale = upward([sum(bar) for bar in bars], from_zero=True, log=False)
    # The values of a batch are of the steps since those before: a bar is as wide as these.
    ends = [group[-1] for group in groups]
    before = max(2 * batches[0] - batches[1], 0) if len(batches) > 1 else 0
    before = min(before, ends[-1] - 1)
    x_scale = across([before, ends[-1]])
    marks = [_axes(x_scale, y_scale, unit)]
    for start, end, bar in zip([before, *ends], ends, bars, strict=False):
        left, width, base = x_scale(start), x_scale(end) - x_scale(start), 0.0
        for index, (name, value) in enumerate(zip(parts, bar, strict=True)):
            top, bottom = y_scale(base + value), y_scale(base)
            base += value
            marks.append(
                f'<rect class="bar s{index}" x="{left:.1f}" y="{top:.1f}" '
                f'width="{max(width - 1, 0.5):.1f}" height="{bottom - top:.1f}">'
                f"<title>batch {number(end)}: {escape(name)} {number(value)} {escape(unit)}"
                f" of {number(sum(bar))}</title></rect>"
            )
    total = sum(bars[-1]) or 1.0
    told = ", ".join(
        f"{name} {value / total:.0%}" for name, value in zip(parts, bars[-1], strict=True)
    )
    summary = f"Last: {number(sum(bars[-1]))} {unit} ({told})."
    legend = [(f"area s{index}", name) for index, name in enumerate(parts)]
    return _figure(title, "".join(marks), legend, summary, explain)


def _starts(count: int) -> range:
    return range(0, count, -(-count // MAX_BARS))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value) and value > 0]
    return sum(finite) / len(values)


def _axes(x_scale: Scale, y_scale: Scale, unit: str) -> str:
    parts = []
    for value in y_scale.ticks():
        y = y_scale(value)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="tick" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">'
            f"{number(value)}</text>"
        )
    for value in x_scale.ticks():
        if value == int(value):
            x = x_scale(value)
            parts.append(
                f'<path class="axis" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>'
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
                f"{number(value)}</text>"
            )
    parts.append(
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">batches</text>'
        f'<text class="tick" x="2" y="{HEIGHT - 6}">{escape(unit)}</text>'
    )
    return "".join(parts)


def _line(series: Series, index: int, x_scale: Scale, y_scale: Scale, unit: str) -> str:
    points = decimate(series.points)
    path, pen_down = [], False
    broken = []
    for x, y in points:
        if math.isfinite(y) and not (y_scale.log and y <= 0):
            path.append(f"{'L' if pen_down else 'M'}{x_scale(x):.1f} {y_scale(y):.1f}")
            pen_down = True
        else:
            pen_down = False
            broken.append(
                f'<text class="broken" x="{x_scale(x):.1f}" y="{TOP + 10}" text-anchor="middle">×'
                f"<title>batch {number(x)}: {number(y)}</title></text>"
            )
    kind = f"line s{index}" + (" faint" if series.faint else "")
    drawn = f'<path class="{kind}" d="{"".join(path)}"/>' if path else ""
    return drawn + _tooltips(series, index, points, x_scale, y_scale, unit) + "".join(broken)


def _tooltips(
    series: Series,
    index: int,
    points: Points,
    x_scale: Scale,
    y_scale: Scale,
    unit: str,
) -> str:
    """A dot with a text where there are few points; beside many, unseen ones that have the text."""
    if series.faint and len(points) > MAX_TOOLTIPS:
        return ""
    shown: Callable[[float], bool] = (
        math.isfinite if not y_scale.log else lambda y: math.isfinite(y) and y > 0
    )
    few = len(points) <= MAX_TOOLTIPS
    chosen = points if few else points[:: -(-len(points) // MAX_TOOLTIPS)]
    kind = f"dot s{index}" + (" faint" if series.faint else "") if few else "hover"
    return "".join(
        f'<circle class="{kind}" cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" r="{3 if few else 6}">'
        f"<title>{escape(series.name)}, batch {number(x)}: {number(y)} {escape(unit)}</title>"
        "</circle>"
        for x, y in chosen
        if shown(y)
    )


def _told(series: Series, unit: str) -> str:
    """The line in words."""
    finite = [(x, y) for x, y in series.points if math.isfinite(y)]
    name = series.name[:1].upper() + series.name[1:]
    broken = len(series.points) - len(finite)
    lost = f" {broken} values are not numbers (×)." if broken else ""
    if not finite:
        return f"{name}: no value is a number.{lost}"
    (first, from_value), (last, to_value) = finite[0], finite[-1]
    if len(finite) == 1:
        return f"{name}: {number(from_value)} {unit} at batch {number(first)}.{lost}"
    low = min(y for _, y in finite)
    high = max(y for _, y in finite)
    return (
        f"{name}: {number(from_value)} at batch {number(first)}, {number(to_value)} {unit} at "
        f"batch {number(last)} (least {number(low)}, greatest {number(high)}).{lost}"
    )


def _figure(
    title: str, marks: str, legend: Sequence[tuple[str, str]], summary: str, explain: str
) -> str:
    keys = "".join(
        '<li><svg class="key" viewBox="0 0 24 10" aria-hidden="true">'
        + (
            f'<rect class="bar {kind.removeprefix("area ")}" width="24" height="10"/>'
            if kind.startswith("area")
            else f'<path class="{kind.removeprefix("line ") if "level" in kind else kind}" '
            'd="M0 5H24"/>'
        )
        + f"</svg>{escape(name)}</li>"
        for kind, name in legend
    )
    note = f"<p>{escape(explain)}</p>" if explain else ""
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}. {escape(summary)}">{marks}</svg>'
        f'<ul class="legend">{keys}</ul><figcaption>{note}<p class="told">{escape(summary)}</p>'
        "</figcaption></figure>"
    )
