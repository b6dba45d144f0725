"""Text of a data set on a terminal: anybody may have written it, and a terminal obeys codes."""

from __future__ import annotations


def plain(text: str, limit: int | None = None) -> str:
    """A text in one line of characters that can be seen.

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
