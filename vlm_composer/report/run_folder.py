"""What a run left in its folder, as far as it can be read.

Everything but `metrics.jsonl` may be missing: the run may go on, or be of an older version, or its
callbacks off. A file that is missing or damaged is noted, never an error.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_composer.mds.json_object import MAX_JSON_BYTES, parse_object, read_rows

MAX_PICTURE_BYTES = 2_000_000
MAX_SIZE = 1e300
"""Greater values count as infinite."""


class ReportError(ValueError):
    """There is no run to report on; the message says what is missing and what to do."""


@dataclass
class Captioned:
    """A held-out image with what the model said of it."""

    name: str
    truth: str
    picture: str | None
    """As a `data:` URL; None where there is none."""
    why_no_picture: str = ""
    captions: dict[int, str] = field(default_factory=dict)
    """By the batch of the evaluation."""


@dataclass
class Run:
    """A run's folder."""

    folder: Path
    metrics: dict[str, list[tuple[int, float]]]
    """For each metric its values with their batches, which rise."""
    facts: dict[str, Any] | None
    """`run.json`; None where there is none."""
    warnings: list[dict[str, Any]]
    """Lines of `warnings.jsonl` with `batch`, `name` and `message`."""
    captioned: list[Captioned]
    notes: list[str]
    """What of the files could not be read."""

    def values(self, name: str) -> list[tuple[int, float]]:
        """A metric's values; none where it was not logged."""
        return self.metrics.get(name, [])

    def last(self, name: str) -> float | None:
        """A metric's newest value."""
        points = self.values(name)
        return points[-1][1] if points else None

    @property
    def last_batch(self) -> int:
        """The newest batch of which anything is known."""
        batches = [points[-1][0] for points in self.metrics.values() if points]
        return max(batches, default=0)

    def fact(self, *path: str) -> Any:
        """An entry of `run.json`; None where it, or anything above it, is missing."""
        entry: Any = self.facts
        for key in path:
            entry = entry.get(key) if isinstance(entry, Mapping) else None
        return entry


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        ReportError: There is no such folder, or it has no metrics.
    """
    if not folder.is_dir():
        raise ReportError(
            f"{folder} is not a folder; give the run's (run_folder in its yaml, such as runs/demo)"
        )
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ReportError(
            f"{folder} has no metrics.jsonl: the run has not begun, or its yaml lacks "
            "loggers.jsonl, which writes it; or this is not a run's folder (run_folder in its yaml)"
        )
    notes: list[str] = []
    metrics = _metrics(path, notes)
    if not metrics:
        notes.append("metrics.jsonl holds no metric yet.")
    return Run(
        folder=folder,
        metrics=metrics,
        facts=_facts(folder / "run.json", notes),
        warnings=_warnings(folder / "warnings.jsonl", notes),
        captioned=_captioned(folder / "captions", notes),
        notes=notes,
    )


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    try:
        rows, unread = read_rows(path)
    except OSError as error:
        notes.append(f"{path.name} could not be read: {error.strerror}.")
        return []
    if unread:
        notes.append(
            f"{unread} line{'s' * (unread > 1)} of {path.name} could not be read: the last one may "
            "be half written while the run goes on."
        )
    return rows


def _metrics(path: Path, notes: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Metrics that are numbers. Where batches go back, a resumed run trained them again: its values
    take the place of those before."""
    metrics: dict[str, list[tuple[int, float]]] = {}
    replaced_from: set[int] = set()
    for row in _lines(path, notes):
        batch = row.pop("batch", None)
        if not isinstance(batch, int) or not 0 <= batch < 2**53:
            continue
        for name, value in row.items():
            if not isinstance(value, int | float):
                continue
            points = metrics.setdefault(name, [])
            while points and points[-1][0] > batch:
                replaced_from.add(batch)
                points.pop()
            if points and points[-1][0] == batch:
                points.pop()  # logged twice for one batch: the newer counts
            points.append((batch, _as_float(value)))
    if replaced_from:
        notes.append(
            "metrics.jsonl goes back in batches: the run was resumed from before its end, and the "
            "values of the batches that were trained again count (from batch "
            f"{min(replaced_from)})."
        )
    return metrics


def _as_float(value: float) -> float:
    """A number that can be drawn: not so great or so small that its axis would overflow."""
    if abs(value) > MAX_SIZE:
        return math.copysign(math.inf, 1 if value > 0 else -1)
    return 0.0 if abs(value) < 1 / MAX_SIZE else float(value)


def _facts(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            return parse_object(file.read(MAX_JSON_BYTES + 1), finite=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(f"run.json could not be read: {error}.")
        return None


def _warnings(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [row for row in _lines(path, notes) if {"name", "message"} <= row.keys()]


def _captioned(folder: Path, notes: list[str]) -> list[Captioned]:
    if not folder.is_dir():
        return []
    found: dict[tuple[str, str], Captioned] = {}  # by id and picture: ids need not differ
    batch_of = {
        path: int(match[1])
        for path in folder.iterdir()
        if (match := re.fullmatch(r"ba([0-9]{1,15})\.jsonl", path.name))
    }
    for path, batch in sorted(batch_of.items(), key=lambda item: item[1]):
        for place, row in enumerate(_lines(path, notes)):
            name = str(row.get("id", place))
            key = name, str(row.get("image"))
            if key not in found:
                picture, why = _picture(folder, row.get("image"))
                found[key] = Captioned(name, str(row.get("truth", "")), picture, why)
            found[key].captions[batch] = str(row.get("caption", ""))
    return list(found.values())


def _picture(folder: Path, place: Any) -> tuple[str | None, str]:
    """A picture below the folder as a `data:` URL, or why there is none.

    The place comes from the data's ids: it may lead anywhere, and is not followed out.
    """
    if place is None:
        return None, "the data hold features in place of images"
    path = folder / str(place)
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return None, "its path leads out of the run's folder"
        if path.stat().st_size > MAX_PICTURE_BYTES:
            return None, f"larger than {MAX_PICTURE_BYTES / 1e6:.0f} MB"
        content = path.read_bytes()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None, "its file is missing"
    kinds = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png"}
    kind = next((kind for start, kind in kinds.items() if content.startswith(start)), None)
    if kind is None:
        return None, "not a JPEG or PNG"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", ""
