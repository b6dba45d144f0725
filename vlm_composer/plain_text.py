"""Text of others on a terminal and in a log: anybody may have written it, and a terminal obeys
escape codes, and whoever reads a log believes its lines."""

from __future__ import annotations

import logging
import sys
from typing import TextIO


def plain(text: str, limit: int | None = None) -> str:
    """Return a text in one line of characters that can be seen.

    Args:
        text: Any text.
        limit: Characters that are shown, at most; None shows all.

    Returns:
        The text, with `⏎` for newlines and escapes for whatever else does not print.
    """
    cut = limit is not None and len(text) > limit
    shown = text[: limit - 1] if cut and limit is not None else text
    characters = (
        "⏎" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in shown
    )
    return "".join(characters) + ("…" if cut else "")


def plain_lines(text: str) -> str:
    """Return a text of several lines, of which all but the first begin with a space.

    So no part of a message can pass for a line of its own.
    """
    first, *others = (plain(line) for line in text.split("\n"))
    indented = (line if line.startswith(" ") or not line else f"  {line}" for line in others)
    return "\n".join([first, *indented])


def say(message: object, file: TextIO | None = None) -> None:
    """Print a message, whatever it quotes.

    Args:
        message: An error, or any text.
        file: Where to; stderr when None.
    """
    print(plain_lines(str(message)), file=file or sys.stderr)


class PlainFormatter(logging.Formatter):
    """Formats log records so that none can pass for several, or for a command to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return plain_lines(super().format(record))
