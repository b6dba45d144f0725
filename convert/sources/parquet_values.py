"""One row's value of a Parquet column, measured before a copy of it is made."""

from __future__ import annotations

from typing import Any

from convert.errors import Reason, Rejected

_BY_LENGTH = ("string", "large_string", "binary", "large_binary")
"""Types whose values pyarrow can measure without a copy."""
_MOST_TURNS = 10_000
"""Of a conversation, each of which is made an object of Python's."""


def value_of(batch: Any, column: str, max_bytes: int) -> Any:
    """Return the value of a column as an object of Python's.

    Args:
        batch: A record batch of one row.
        column: The column's name.
        max_bytes: What its text or image may take.

    Returns:
        The value, or the `Rejected` that says why there is none.
    """
    values = batch.column(column)
    turns = len(values.flatten()) if hasattr(values, "value_lengths") else 0
    if turns > _MOST_TURNS:
        return Rejected(Reason.TOO_LARGE, f"{column}: {turns} turns, more than {_MOST_TURNS}")
    # Nothing is larger than what holds it, but in a list: each text can be all of a dictionary.
    if max(turns, 1) * values.nbytes > max_bytes and (count := _bytes_of(values)) > max_bytes:
        return Rejected(
            Reason.TOO_LARGE, f"{column}: {count} bytes, more than a shard holds ({max_bytes})"
        )
    try:
        return values[0].as_py()
    except UnicodeDecodeError as error:
        return Rejected(Reason.NOT_UNICODE, f"{column}: {error}")


def _bytes_of(values: Any) -> int:
    """Bytes of an array's texts when each stands for itself; of several fields, of the largest."""
    from pyarrow import StructArray, compute, types

    kind = values.type
    if isinstance(values, StructArray):
        return max(map(_bytes_of, values.flatten()), default=0)
    if types.is_nested(kind):  # lists
        return _bytes_of(values.flatten())
    if types.is_dictionary(kind):
        lengths = compute.take(compute.binary_length(values.dictionary), values.indices)
    elif str(kind) in _BY_LENGTH:
        lengths = compute.binary_length(values)
    else:
        return int(values.nbytes)
    return int(compute.sum(lengths).as_py() or 0)
