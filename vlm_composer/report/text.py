"""Numbers and nested documents as texts, which are not escaped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def number(value: object) -> str:
    """Three or four digits of a number, with thousands set apart; what is none as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}".replace("-", "−")
    if size >= 1e6 or size < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}".replace("-", "−")
    digits = max(0, 3 - math.floor(math.log10(size)) - 1) if size >= 1 else 3
    text = f"{value:,.{max(digits, 0)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def flat(entry: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield a nested document as pairs of a dotted name and a text."""
    if isinstance(entry, Mapping) and entry:
        for key, value in entry.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(entry, list) and any(isinstance(item, Mapping) for item in entry):
        for index, value in enumerate(entry):
            yield from flat(value, f"{name}[{index}]")
    elif isinstance(entry, Mapping):
        yield name, "{}"
    elif isinstance(entry, list):
        yield name, ", ".join(map(str, entry)) or "[]"
    elif entry is None:
        yield name, "–"
    elif isinstance(entry, bool):
        yield name, "yes" if entry else "no"
    else:
        yield name, f"{entry:,}" if isinstance(entry, int) and abs(entry) >= 10000 else str(entry)
