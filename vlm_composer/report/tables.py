"""What the run was: tables from `run.json`, and its warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vlm_composer.report.run_folder import Run
from vlm_composer.report.text import duration, escape, flat, foreign

NO_FACTS = (
    "run.json is not in the run's folder, which has this: the run has not begun its first batch, "
    "or is of a version that did not write it, or of another machine's folder."
)
MAX_REPEATS = 3
"""Messages of one kind of warning that are shown in full."""


def warnings_of(run: Run) -> str:
    """Warnings by kind, the newest messages of each."""
    if not run.warnings:
        return "<p>None.</p>" if run.facts is not None else "<p>No warnings.jsonl is here.</p>"
    kinds: dict[str, list[dict[str, Any]]] = {}
    for warning in run.warnings:
        kinds.setdefault(str(warning["name"]), []).append(warning)
    parts = []
    for name, given in kinds.items():
        count = f"{len(given)} times" if len(given) > 1 else "once"
        newest = given[-MAX_REPEATS:]
        lines = "".join(
            f"<li><b>batch {escape(each.get('batch', '?'))}:</b> {foreign(each['message'])}</li>"
            for each in newest
        )
        left = f" The last {MAX_REPEATS}:" if len(given) > MAX_REPEATS else ""
        parts.append(f"<h3>{escape(name)}</h3><p>Given {count}.{left}</p><ul>{lines}</ul>")
    return f'<div class="warnings">{"".join(parts)}</div>'


def reproducibility_of(run: Run) -> str:
    """What one needs to have the same bits again, and to know that one has."""
    if run.facts is None:
        return _absent(NO_FACTS)
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
    return _table(rows)


def facts_of(run: Run, key: str) -> str:
    """An entry of `run.json` as a table."""
    if run.facts is None:
        return _absent(NO_FACTS)
    entry = run.fact(key)
    if not entry:
        return _absent(f"run.json has no entry {key!r}.")
    return _table(flat(entry))


def data_of(run: Run) -> str:
    """The data sets and what the conversion said of them."""
    if run.facts is None:
        return _absent(NO_FACTS)
    data = run.fact("data")
    if not isinstance(data, Mapping):
        return _absent("run.json has no entry 'data'.")
    parts = [_table(flat({k: v for k, v in data.items() if k != "summary"}))]
    if data.get("summary"):
        parts.append("<h3>What the conversion said</h3>" + _table(flat(data["summary"])))
    else:
        parts.append(
            _absent(
                "No summary.json of the conversion was within the run's reach, beside its data."
            )
        )
    return "".join(parts)


def parameters_of(run: Run) -> str:
    """Parts of the model: parameters, whether they are trained, dtype."""
    parts = run.fact("parameters")
    if not isinstance(parts, Mapping) or not parts:
        return _absent(NO_FACTS if run.facts is None else "run.json has no entry 'parameters'.")
    rows = []
    for name, part in parts.items():
        part = part if isinstance(part, Mapping) else {}
        count = part.get("parameters")
        count = f"{count:,}" if isinstance(count, int) else "?"
        trained = "trained" if part.get("trained") else "frozen"
        rows.append((str(name), f"{count} parameters, {trained}, {part.get('dtype', '?')}"))
    return _table(rows)


def timing_of(run: Run) -> str:
    """When it ran and for how long."""
    if run.facts is None:
        return _absent(NO_FACTS)
    wall = run.fact("wall_seconds")
    return _table(
        [
            ("started", _or_dash(run.fact("started"))),
            ("ended", _or_dash(run.fact("ended"))),
            ("took", duration(wall) if isinstance(wall, int | float) else "–"),
            ("batches", _or_dash(run.fact("batches"))),
            ("samples", _or_dash(run.fact("samples"))),
        ]
    )


def _or_dash(value: object) -> str:
    return next(text for _, text in flat(value))


def _absent(why: str) -> str:
    return f'<p class="absent">Not here: {escape(why)}</p>'


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{foreign(text)}</td></tr>" for name, text in rows
    )
    return f'<table class="facts">{lines}</table>'
