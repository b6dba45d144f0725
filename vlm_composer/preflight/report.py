"""A preflight's report: as a list, as a line, or as the error that ends a run."""

from __future__ import annotations

import logging

from vlm_composer.plain_text import plain
from vlm_composer.preflight.checks import Report
from vlm_composer.preflight.finding import Finding, Level, counted

log = logging.getLogger(__name__)

_MARKS: dict[Level, str] = {"ok": "✓", "warning": "!", "failure": "✗"}


class PreflightError(ValueError):
    """A run cannot start. Its text has every reason, one a line where there are several."""


def describe(report: Report) -> str:
    """Format a report as a list, with what to do below what is not as it should be."""
    lines = []
    for name, findings in report.items():
        for number, finding in enumerate(findings):
            first = [plain(line) for line in finding.text.split("\n")]
            lines.append(f"{_MARKS[finding.level]} {'' if number else name:<15} {first[0]}")
            lines += [f"{'':<17} {line.strip()}" for line in first[1:]]
            if finding.advice:
                lines.append(f"{'':<17} → {plain(finding.advice)}")
    return "\n".join([*lines, summary(report)])


def summary(report: Report) -> str:
    """One line: how many checks, and how many warnings and failures."""
    parts = [counted(len(report), "check")]
    for level in ("failure", "warning"):
        if number := len(_of(report, level)):
            parts.append(counted(number, level))
    return f"Preflight: {', '.join(parts)}"


def has_failed(report: Report) -> bool:
    """Whether a run could not start."""
    return bool(_of(report, "failure"))


def judge(report: Report) -> None:
    """Refuse the run, or log a line and the warnings.

    Raises:
        PreflightError: A check failed.
    """
    refuse(report)
    log.info("%s.", summary(report))
    for name, finding in _of(report, "warning"):
        log.warning("Preflight, %s: %s.", name, finding)


def refuse(report: Report) -> None:
    """Refuse a run that has failed a check, with all failures.

    Raises:
        PreflightError: A check failed.
    """
    failures = _of(report, "failure")
    if failures:
        texts = [f"{name}: {finding}" for name, finding in failures]
        if len(texts) == 1:
            raise PreflightError(texts[0])
        raise PreflightError(
            "\n".join(
                [f"{len(texts)} things to mend before the run:", *(f"  - {t}" for t in texts)]
            )
        )


def _of(report: Report, level: str) -> list[tuple[str, Finding]]:
    return [(n, f) for n, findings in report.items() for f in findings if f.level == level]
