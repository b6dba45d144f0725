"""What the run was: tables from `run.json`.

In place of a table stands a text where there is none: why.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlm_composer.report.run_folder import Run
from vlm_composer.report.text import duration, flat

NO_FACTS = (
    "run.json is not in the run's folder, which has this: the run has not begun its first batch, "
    "or is of a version that did not write it, or of another machine's folder."
)
Rows = list[tuple[str, str]]
"""Names and values of a table."""


def reproducibility_of(run: Run) -> Rows | str:
    """What one needs to have the same bits again, and to know that one has."""
    if run.facts is None:
        return NO_FACTS
    resumed = run.fact("resumed_at")
    if isinstance(resumed, list):
        resumed = ", ".join(f"batch {batch}" for batch in resumed) or "never"
    command = run.fact("command")
    rows = [
        ("command", " ".join(map(str, command)) if isinstance(command, list) else "–"),
        ("commit", _or_dash(run.fact("commit"))),
        *flat(run.fact("seeds") or {}, "seeds"),
        ("deterministic_mode", _or_dash(run.fact("config", "deterministic_mode"))),
        ("resumed after", _or_dash(resumed)),
        *flat(run.fact("towers") or {}, "towers"),
    ]
    for split in ("train", "eval"):
        rows.append(
            (f"hash of the {split} index", _or_dash(run.fact("data", split, "index_xxh64")))
        )
    legs = run.fact("legs")
    for leg in legs if isinstance(legs, list) else []:
        if isinstance(leg, Mapping):
            seconds = leg.get("seconds")
            took = duration(seconds) if isinstance(seconds, int | float) else "?"
            rows.append(
                (
                    "leg",
                    f"{leg.get('start')}: batch {leg.get('batch')} to {leg.get('last_batch')}, "
                    f"{took}",
                )
            )
    return rows


def facts_of(run: Run, key: str) -> Rows | str:
    """An entry of `run.json` as a table."""
    if run.facts is None:
        return NO_FACTS
    entry = run.fact(key)
    if not entry:
        return f"run.json has no entry {key!r}."
    return [*flat(entry)]


def data_of(run: Run) -> dict[str, Rows | str]:
    """The data sets and what the conversion said of them, by heading."""
    data = run.fact("data")
    if not isinstance(data, Mapping):
        return {"": NO_FACTS if run.facts is None else "run.json has no entry 'data'."}
    summary = data.get("summary")
    return {
        "": [*flat({k: v for k, v in data.items() if k != "summary"})],
        "What the conversion said": [*flat(summary)]
        if summary
        else "No summary.json of the conversion was within the run's reach, beside its data.",
    }


def parameters_of(run: Run) -> Rows | str:
    """Parts of the model: parameters, whether they are trained, dtype."""
    parts = run.fact("parameters")
    if not isinstance(parts, Mapping) or not parts:
        return NO_FACTS if run.facts is None else "run.json has no entry 'parameters'."
    rows = []
    for name, part in parts.items():
        part = part if isinstance(part, Mapping) else {}
        count = part.get("parameters")
        count = f"{count:,}" if isinstance(count, int) else "?"
        trained = "trained" if part.get("trained") else "frozen"
        rows.append((str(name), f"{count} parameters, {trained}, {part.get('dtype', '?')}"))
    return rows


def timing_of(run: Run) -> Rows | str:
    """When it ran and for how long."""
    if run.facts is None:
        return NO_FACTS
    wall = run.fact("wall_seconds")
    return [
        ("started", _or_dash(run.fact("started"))),
        ("ended", _or_dash(run.fact("ended"))),
        ("took", duration(wall) if isinstance(wall, int | float) else "–"),
        ("batches", _or_dash(run.fact("batches"))),
        ("samples", _or_dash(run.fact("samples"))),
    ]


def _or_dash(value: object) -> str:
    return next(text for _, text in flat(value))
