"""The page of a run: what `page.html.jinja` shows."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm_composer.rendering import load_templates
from vlm_composer.report.curves import charts_of
from vlm_composer.report.run_folder import Captioned, Run
from vlm_composer.report.tables import (
    data_of,
    facts_of,
    parameters_of,
    reproducibility_of,
    timing_of,
)
from vlm_composer.report.verdict import judge

MAX_IMAGES = 24
MAX_EVALUATIONS = 10
MAX_REPEATS = 3
"""Messages of one kind of warning that are shown in full."""

_PAGE = load_templates(Path(__file__).parent).get_template("page.html.jinja")


def render(run: Run) -> str:
    """Return a run as one HTML page that needs nothing but itself."""
    warnings: dict[str, list[dict[str, Any]]] = {}
    for warning in run.warnings:
        warnings.setdefault(str(warning["name"]), []).append(warning)
    batches = sorted({batch for each in run.captioned for batch in each.captions})
    evaluations = _spread(batches, MAX_EVALUATIONS)
    return _PAGE.render(
        run=run,
        name=run.fact("run_name") or run.folder.resolve().name,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdict=judge(run),
        charts=charts_of(run),
        evaluations=evaluations,
        captions_note=_captions_note(run.captioned, batches, len(evaluations)),
        max_images=MAX_IMAGES,
        warnings=warnings,
        max_repeats=MAX_REPEATS,
        tables={
            "data": data_of(run),
            "model": {"": parameters_of(run)},
            "time": {"": timing_of(run)},
            "hardware": {"": facts_of(run, "hardware")},
            "versions": {"": facts_of(run, "versions")},
            "reproducibility": {"": reproducibility_of(run)},
            "configuration": {"": facts_of(run, "config")},
        },
    )


def _spread(batches: list[int], most: int) -> list[int]:
    """The first, the last, and evenly chosen ones between."""
    if len(batches) <= most:
        return batches
    return [batches[round(i * (len(batches) - 1) / (most - 1))] for i in range(most)]


def _captions_note(captioned: list[Captioned], batches: list[int], shown: int) -> str:
    note = ["The pictures are held out: the model never trained on them."]
    if shown < len(batches):
        note.append(f"Of {len(batches)} evaluations {shown} are shown, spread over the run.")
    if len(captioned) > MAX_IMAGES:
        note.append(f"Of {len(captioned)} pictures the first {MAX_IMAGES} are shown.")
    newest = {each.captions.get(batches[-1]) for each in captioned}
    if len(newest) == 1 and len(captioned) > 2:
        note.append("The newest caption is the same under every picture: that is a fault.")
    return " ".join(note)
