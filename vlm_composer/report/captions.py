"""Held-out pictures, each with its true caption and what the model said at each evaluation."""

from __future__ import annotations

from vlm_composer.report.run_folder import Captioned, Run
from vlm_composer.report.text import foreign

MAX_IMAGES = 24
MAX_EVALUATIONS = 10


def captions_of(run: Run) -> str:
    """The section's content."""
    if not run.captioned:
        return (
            '<p class="absent">No captions: callbacks.captions was off in this run, or no '
            "evaluation has ended yet. It writes them into captions/ of the run's folder.</p>"
        )
    batches = sorted({batch for each in run.captioned for batch in each.captions})
    shown = _spread(batches, MAX_EVALUATIONS)
    told = ["The pictures are held out: the model never trained on them."]
    if len(shown) < len(batches):
        told.append(f"Of {len(batches)} evaluations {len(shown)} are shown, spread over the run.")
    if len(run.captioned) > MAX_IMAGES:
        told.append(f"Of {len(run.captioned)} pictures the first {MAX_IMAGES} are shown.")
    newest = {each.captions.get(batches[-1]) for each in run.captioned}
    if len(newest) == 1 and len(run.captioned) > 2:
        told.append("The newest caption is the same under every picture: that is a fault.")
    cards = "".join(_card(each, shown) for each in run.captioned[:MAX_IMAGES])
    return f'<p>{" ".join(told)}</p><div class="cards">{cards}</div>'


def _spread(batches: list[int], most: int) -> list[int]:
    """The first, the last, and evenly chosen ones between."""
    if len(batches) <= most:
        return batches
    return [batches[round(i * (len(batches) - 1) / (most - 1))] for i in range(most)]


def _card(each: Captioned, batches: list[int]) -> str:
    picture = (
        f'<img src="{each.picture}" alt="held-out picture">'
        if each.picture
        else f'<p class="absent nopicture">No picture: {each.why_no_picture}.</p>'
    )
    rows = "".join(
        f"<tr><th>{'untrained' if batch == 0 else f'batch {batch:,}'}</th>"
        f"<td>{_said(each, batch)}</td></tr>"
        for batch in batches
    )
    return (
        f'<article class="card">{picture}<div><p class="truth"><span>true</span> '
        f'{foreign(each.truth)}</p><table class="said">{rows}</table>'
        f'<p class="id">{foreign(each.name)}</p></div></article>'
    )


def _said(each: Captioned, batch: int) -> str:
    if batch not in each.captions:
        return '<span class="absent">not captioned then</span>'
    caption = each.captions[batch]
    if not caption.strip():
        return '<span class="absent">(nothing)</span>'
    right = caption.strip().lower() == each.truth.strip().lower()
    return foreign(caption) + (' <span class="right">(word for word)</span>' if right else "")
