"""The page, from its sections."""

from __future__ import annotations

from datetime import UTC, datetime

from vlm_composer.report.captions import captions_of
from vlm_composer.report.curves import charts_of
from vlm_composer.report.run_folder import Run
from vlm_composer.report.style import STYLE
from vlm_composer.report.tables import (
    data_of,
    facts_of,
    parameters_of,
    reproducibility_of,
    timing_of,
    warnings_of,
)
from vlm_composer.report.text import escape, foreign
from vlm_composer.report.verdict import Verdict, judge

# Whatever foreign text might bring along, a browser may fetch nothing and run nothing for it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"


def render(run: Run) -> str:
    """Write a run as one HTML page that needs nothing but itself."""
    name = run.fact("run_name") or run.folder.resolve().name
    sections = {
        "captions": ("Captions", captions_of(run)),
        "curves": ("Curves", f'<div class="charts">{"".join(charts_of(run))}</div>'),
        "warnings": ("Warnings", warnings_of(run)),
        "data": ("Data", data_of(run)),
        "model": ("Model", parameters_of(run)),
        "time": ("Time", timing_of(run)),
        "hardware": ("Hardware", facts_of(run, "hardware")),
        "versions": ("Versions", facts_of(run, "versions")),
        "reproducibility": ("Reproducibility", reproducibility_of(run)),
        "configuration": ("Configuration", facts_of(run, "config")),
    }
    if run.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
        sections["files"] = ("What could not be read", f"<ul>{notes}</ul>")
    links = " ".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items())
    body = "".join(
        f'<section id="{key}"><h2>{title}</h2>{content}</section>'
        for key, (title, content) in sections.items()
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: did the connector learn to see?</title>"
        f"<style>{STYLE}</style></head><body>"
        f"<header><h1>{foreign(name)}</h1><p>A connector between a vision tower and a language "
        f"model, trained so that the language model can see. Written {written} from "
        f"{foreign(run.folder)}.</p></header><main>{_verdict(judge(run))}<nav>{links}</nav>{body}"
        "</main><footer><p>Made by vlm_composer. “Nats a token” is the loss: the natural logarithm "
        "of how unlikely the model found each word piece of a true caption; 0.69 less is twice as "
        "likely.</p></footer></body></html>\n"
    )


def _verdict(verdict: Verdict) -> str:
    facts = "".join(
        f'<div><dt>{escape(fact.name)}</dt><dd class="value">{escape(fact.value)}</dd>'
        f'<dd class="meaning">{escape(fact.meaning)}</dd></div>'
        for fact in verdict.facts
    )
    steps = "".join(f"<li>{escape(step)}</li>" for step in verdict.next_steps)
    steps = f"<p>What to do next:</p><ul>{steps}</ul>" if steps else ""
    return (
        f'<section id="verdict" class="verdict {verdict.tone}">'
        f"<p>Did the connector learn to see?</p>"
        f"<h2>{escape(verdict.headline)}</h2><p>{escape(verdict.why)}</p>"
        f'<dl class="numbers">{facts}</dl>{steps}</section>'
    )
