"""JSON that anybody may have written: the index of a data set, and what describes it beside it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

MAX_JSON_BYTES = 1 << 26
"""64 MiB: the index of the full recipe's features, 14,000 shards, has 9 MB."""

_DEPTH = 32
_DIGITS = 19
"""Of an integer: as many as int64 has."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_object(data: bytes, *, finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object whose every value can be counted with, printed and written again.

    Args:
        data: The file.
        finite: Refuse numbers that are not finite; metrics may be NaN.

    Raises:
        ValueError: It is not one; it is larger than MAX_JSON_BYTES or nested too deep; or it holds
            a number that is not finite or beyond int64, or half a pair of surrogates.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than the {MAX_JSON_BYTES} bytes that are read")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_number if finite else float,
            parse_constant=_refuse_number if finite else float,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        nested = (node for node in level if isinstance(node, dict | list))
        level = [v for node in nested for v in (node.values() if isinstance(node, dict) else node)]
    if level:
        raise ValueError(f"it is nested more than {_DEPTH} deep")
    return value


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a file of JSON lines, of which the last may be half written.

    Args:
        path: The file.

    Returns:
        Its objects, numbers that are not finite among their values, and how many lines are none.

    Raises:
        OSError: It cannot be read.
    """
    rows, unread = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(parse_object(line, finite=False))
        except ValueError:
            unread += bool(line.strip())
    return rows, unread


def fault_of(value: object, shape: Any, at: str = "it") -> str | None:
    """Compare a JSON value with a shape.

    Args:
        value: The value.
        shape: A predicate; a list of one shape, that of every entry; a dictionary of a shape for
            each key, or with `str` for its one key, whose shape is that of every value.
        at: What messages call the value.

    Returns:
        The first difference, in a line; None where there is none.
    """
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} is {shown(value)}, not a list"
        parts = [(f"{at}[{place}]", part, shape[0]) for place, part in enumerate(value)]
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{at} is {shown(value)}, not an object"
        kinds = dict.fromkeys(value, shape[str]) if str in shape else shape
        if value.keys() != kinds.keys():
            differing = sorted(value.keys() ^ kinds.keys())
            return f"{at} has or lacks {shown(differing[0])}"
        parts = [(f"{at}.{shown(key)[1:-1]}", value[key], kinds[key]) for key in value]
    else:
        return None if shape(value) else f"{at} is {shown(value)}"
    found = (fault_of(part, kind, name) for name, part, kind in parts)
    return next((fault for fault in found if fault is not None), None)


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that can be encoded: no half of a pair of surrogates is in it."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def shown(value: object) -> str:
    """Format a foreign value for a message: in one line that prints, and short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of at least 0 within int64, and not a bool."""
    return type(value) is int and 0 <= value < 1 << 63


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _DIGITS or abs(number := int(digits)) >= 1 << 63:
        _refuse_number(digits)
    return number


def _number(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        _refuse_number(digits)
    return number


def _refuse_number(digits: str) -> NoReturn:
    raise ValueError(f"the number {digits[:20]}{'…' if len(digits) > 20 else ''} is too large")
