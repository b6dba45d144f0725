"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        level: "failure" keeps a run from starting.
        text: What was found, with the values.
        advice: What to do; empty where nothing is, or where the text says it.
    """

    level: Level
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}" if self.advice else self.text


class Findings(list[Finding]):
    """What a check found, collected while it looks."""

    def ok(self, text: str) -> None:
        """Say what is as it should be."""
        self.append(Finding("ok", text))

    def warn(self, text: str, advice: str) -> None:
        """Say what is likely to be wrong."""
        self.append(Finding("warning", text, advice))

    def fail(self, text: str, advice: str = "") -> None:
        """Say what cannot work."""
        self.append(Finding("failure", text, advice))

    @property
    def has_failed(self) -> bool:
        """Whether something cannot work."""
        return any(finding.level == "failure" for finding in self)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Take what is raised for a failure: its message says what to do."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.fail(str(error))


def counted(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`, `3 passes`."""
    ending = "" if number == 1 else "es" if what.endswith(("s", "ch")) else "s"
    return f"{number:,} {what}{ending}"


def readable(size: float) -> str:
    """Bytes as people read them, with a thousand for each step."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
