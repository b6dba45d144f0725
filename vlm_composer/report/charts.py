"""Charts as inline SVG: axes, ticks, legend, a tooltip at points, and a text that says the same.

Colours are classes, which the page's style sheet fills in, for light, dark and paper. Lines are
dashed apart as well, for who cannot tell the colours. matplotlib draws neither tooltips nor
colours that follow the page, in as many bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vlm_composer.rendering import load_templates
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
from vlm_composer.report.text import number

MAX_TOOLTIPS = 40
MAX_BARS = 40

_FIGURE = load_templates(Path(__file__).parent).get_template("chart.html.jinja")


class Mark:
    """An element of a drawing, with the text in it and the one that is shown when it is touched."""

    def __init__(
        self, tag: str, kind: str, text: str = "", tip: str = "", **at: float | str
    ) -> None:
        self.tag, self.text, self.tip = tag, text, tip
        places = {
            name.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else value
            for name, value in at.items()
        }
        self.attributes = {"class": kind, **places}


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
) -> Markup:
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
    marks = [*_axes(x_scale, y_scale, unit)]
    legend = [
        Mark("path", f"line s{i}" + (" faint" if s.faint else ""), s.name, d="M0 5H24")
        for i, s in enumerate(series)
    ]
    if level is not None:
        name = f"{level[0]} ({number(level[1])})"
        marks.append(Mark("path", "level", d=f"M{LEFT} {y_scale(level[1]):.1f}H{WIDTH - RIGHT}"))
        legend.append(Mark("path", "level", name, d="M0 5H24"))
    for index, each in enumerate(series):
        marks += _line(each, index, x_scale, y_scale, unit)
    summary = " ".join(
        _describe(each, unit) for each in series if not each.faint or len(series) == 1
    )
    return draw_figure(title, marks=marks, legend=legend, summary=summary, explain=explain)


def stacked_chart(
    title: str, parts: Mapping[str, Points], *, unit: str = "", explain: str = ""
) -> Markup:
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
    marks = [*_axes(x_scale, y_scale, unit)]
    for start, end, bar in zip([before, *ends], ends, bars, strict=False):
        left, width, base = x_scale(start), x_scale(end) - x_scale(start), 0.0
        for index, (name, value) in enumerate(zip(parts, bar, strict=True)):
            top, bottom = y_scale(base + value), y_scale(base)
            base += value
            tip = f"batch {number(end)}: {name} {number(value)} {unit} of {number(sum(bar))}"
            place: dict[str, Any] = {
                "x": left,
                "y": top,
                "width": max(width - 1, 0.5),
                "height": bottom - top,
            }
            marks.append(Mark("rect", f"bar s{index}", tip=tip, **place))
    total = sum(bars[-1]) or 1.0
    shares = ", ".join(
        f"{name} {value / total:.0%}" for name, value in zip(parts, bars[-1], strict=True)
    )
    return draw_figure(
        title,
        marks=marks,
        legend=[
            Mark("rect", f"bar s{index}", name, width=24, height=10)
            for index, name in enumerate(parts)
        ],
        summary=f"Last: {number(sum(bars[-1]))} {unit} ({shares}).",
        explain=explain,
    )


def draw_figure(title: str, **content: object) -> Markup:
    """Return a `<figure>`: `marks`, `legend`, `summary` and `explain`, or why there is no chart.

    Args:
        title: What is shown.
        content: Of `chart.html.jinja`.
    """
    return Markup(_FIGURE.render(title=title, width=WIDTH, height=HEIGHT, **content))


def _starts(count: int) -> range:
    return range(0, count, -(-count // MAX_BARS))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value) and value > 0]
    return sum(finite) / len(values)


def _axes(x_scale: Scale, y_scale: Scale, unit: str) -> Iterator[Mark]:
    right, foot = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in y_scale.ticks():
        y = y_scale(value)
        yield Mark("path", "grid", d=f"M{LEFT} {y:.1f}H{right}")
        yield Mark("text", "tick", number(value), x=LEFT - 5, y=y + 4, text_anchor="end")
    for value in x_scale.ticks():
        if value == int(value):
            x = x_scale(value)
            yield Mark("path", "axis", d=f"M{x:.1f} {foot}v4")
            yield Mark("text", "tick", number(value), x=x, y=foot + 17, text_anchor="middle")
    yield Mark("path", "axis", d=f"M{LEFT} {TOP}V{foot}H{right}")
    yield Mark("text", "tick", "batches", x=right, y=HEIGHT - 6, text_anchor="end")
    yield Mark("text", "tick", unit, x=2, y=HEIGHT - 6)


def _line(series: Series, index: int, x_scale: Scale, y_scale: Scale, unit: str) -> Iterator[Mark]:
    points = decimate(series.points)
    path, pen_down = [], False
    broken = []
    for x, y in points:
        if math.isfinite(y) and not (y_scale.log and y <= 0):
            path.append(f"{'L' if pen_down else 'M'}{x_scale(x):.1f} {y_scale(y):.1f}")
            pen_down = True
        else:
            pen_down = False
            tip = f"batch {number(x)}: {number(y)}"
            place: dict[str, Any] = {"x": x_scale(x), "y": TOP + 10, "text_anchor": "middle"}
            broken.append(Mark("text", "broken", "×", tip, **place))
    if path:
        kind = f"line s{index}" + (" faint" if series.faint else "")
        yield Mark("path", kind, d="".join(path))
    yield from _tooltips(series, index, points, x_scale, y_scale, unit)
    yield from broken


def _tooltips(
    series: Series,
    index: int,
    points: Points,
    x_scale: Scale,
    y_scale: Scale,
    unit: str,
) -> Iterator[Mark]:
    """A dot with a text where there are few points; beside many, unseen ones that have the text."""
    if series.faint and len(points) > MAX_TOOLTIPS:
        return
    shown: Callable[[float], bool] = (
        math.isfinite if not y_scale.log else lambda y: math.isfinite(y) and y > 0
    )
    few = len(points) <= MAX_TOOLTIPS
    chosen = points if few else points[:: -(-len(points) // MAX_TOOLTIPS)]
    kind = f"dot s{index}" + (" faint" if series.faint else "") if few else "hover"
    for x, y in chosen:
        if shown(y):
            tip = f"{series.name}, batch {number(x)}: {number(y)} {unit}"
            yield Mark("circle", kind, tip=tip, cx=x_scale(x), cy=y_scale(y), r=3 if few else 6)


def _describe(series: Series, unit: str) -> str:
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
