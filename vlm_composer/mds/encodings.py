"""The encodings of MDS columns that are read: text, bytes, and arrays of a fixed dtype and shape.

streaming 0.13 knows more of them, and one of those, `pkl`, runs what a data set says. Samples are
decoded here and not by streaming, so that nothing that is not on this list can be reached.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENCODINGS = "str, bytes and ndarray:DTYPE:N,V of uint16, float16 or float32"
"""The list, for messages."""

_ARRAY = re.compile(r"ndarray:(uint16|float16|float32):([1-9][0-9]{0,8}),([1-9][0-9]{0,8})")

Decode = Callable[[bytes], Any]


def array_encoding(dtype: str, shape: tuple[int, int]) -> str:
    """Return the encoding of arrays (N, V) of a dtype.

    Raises:
        ValueError: There is none for that dtype and shape.
    """
    encoding = f"ndarray:{dtype}:{shape[0]},{shape[1]}"
    _array(encoding)
    return encoding


def fixed_bytes(encoding: str) -> int | None:
    """Return the bytes of any value of an encoding; None where they depend on the value.

    Raises:
        ValueError: It is not on the list.
    """
    if encoding in ("str", "bytes"):
        return None
    dtype, shape = _array(encoding)
    return dtype.itemsize * math.prod(shape)


def _array(encoding: str) -> tuple[np.dtype[Any], tuple[int, int]]:
    match = _ARRAY.fullmatch(encoding)
    if match is None:
        raise ValueError(f"the encoding {encoding[:80]!r} is not read, only {ENCODINGS}")
    return np.dtype(match[1]).newbyteorder("<"), (int(match[2]), int(match[3]))


def _decode_of(encoding: str) -> Decode:
    if encoding == "str":
        return bytes.decode
    if encoding == "bytes":
        return bytes
    dtype, shape = _array(encoding)
    return partial(_decode_array, dtype=dtype, shape=shape)


def _decode_array(data: bytes, dtype: np.dtype[Any], shape: tuple[int, int]) -> NDArray[Any]:
    return np.frombuffer(data, dtype).reshape(shape)


class SampleDecoder:
    """Takes a sample's bytes apart into its columns.

    Args:
        columns: Column name → encoding, in a shard's order.

    Raises:
        ValueError: An encoding is not on the list.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._fields = [
            (name, _decode_of(encoding), fixed_bytes(encoding))
            for name, encoding in columns.items()
        ]
        # The lengths that are not the same for all samples come first.
        self._lengths = struct.Struct(f"<{sum(size is None for *_, size in self._fields)}I")
        self.least_bytes = self._lengths.size + sum(size or 0 for _, _, size in self._fields)
        """Bytes of the smallest sample."""

    def __call__(self, data: bytes) -> dict[str, Any]:
        """Return the values by their columns' names.

        Raises:
            ValueError: The bytes are not such a sample.
        """
        at = self._lengths.size
        lengths = self._lengths.unpack_from(data) if len(data) >= at else ()
        if (size := self.least_bytes + sum(lengths)) != len(data):
            raise ValueError(f"{len(data)} bytes, of which its fields take {size}")
        rest, sample = iter(lengths), {}
        for name, decode, size in self._fields:
            end = at + (next(rest) if size is None else size)
            sample[name] = decode(data[at:end])
            at = end
        return sample
