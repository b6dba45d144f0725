"""JSON Lines: one item a line, so that a bad one costs no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from convert.errors import Reason, Rejected
from convert.sources.captions import decode_text

MAX_LINE_BYTES = 1 << 24
"""A longer line is no pair of an image and its text."""

_BOM = b"\xef\xbb\xbf"


def lines(file: BinaryIO, start: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Every line that is not blank.

    Args:
        file: The file.
        start: Where a line starts, in bytes.

    Yields:
        Where the line starts and where the next one does, in bytes, and what it holds; of one that
        is too long, a little more than `MAX_LINE_BYTES`.
    """
    file.seek(start)
    if start == 0 and file.read(len(_BOM)) == _BOM:
        start = len(_BOM)
    file.seek(start)
    while line := file.readline(MAX_LINE_BYTES + 2):
        end = start + len(line)
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 2)
            end += len(rest)
        if line.strip():
            yield start, end, line
        start = end


def decode_line(line: bytes) -> object | Rejected:
    """The JSON value of a line, or why it is none."""
    if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        return Rejected(Reason.TOO_LARGE, f"a line of more than {MAX_LINE_BYTES} bytes")
    try:
        # As the items of a list are read: half a surrogate pair is for the record to refuse.
        return json.loads(decode_text(line, "surrogatepass"))
    except Rejected as rejected:
        return Rejected(Reason.NOT_JSON, rejected.detail)
    except (ValueError, RecursionError) as error:
        return Rejected(Reason.NOT_JSON, f"{type(error).__name__}: {error}")
