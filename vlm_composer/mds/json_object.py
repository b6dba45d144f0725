"""JSON that anybody may have written: the index of a data set, and what describes it beside it."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeGuard

MAX_JSON_BYTES = 1 << 26
"""64 MiB: the index of the full recipe's features, 14,000 shards, has 9 MB."""

_DEPTH = 32
_DIGITS = 19
"""Of an integer: as many as int64 has."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object whose every value can be counted with, printed and written again.

    Args:
        data: The file.

    Raises:
        ValueError: It is not one; it is larger than MAX_JSON_BYTES or nested too deep; or it holds
            a number that is not finite or beyond int64, or half a pair of surrogates.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than the {MAX_JSON_BYTES} bytes that are read")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, parse_int=_integer, parse_float=_number, parse_constant=_refuse_number
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


def shown(value: object) -> str:
    """Format a foreign value for a message: in one line that prints, and short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of at least 0, and not a bool."""
    return type(value) is int and value >= 0


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
