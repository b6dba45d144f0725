"""The bytes of MDS shards, the same as MDSWriter's of streaming 0.13, at the cost of one copy.

A shard is read by its head: for example of two samples with the columns `answer` and `image`

    u32     2                 the number of samples
    u32 × 3 120, 170, 230     where each sample begins in the file, and where the last one ends
    JSON    {"column_names"…  how the samples are encoded
    sample  u32 × 2           the lengths of its values, but for columns whose length is fixed
            its values        one after the other, in the order of the columns' names
    sample  …

So a shard can be written only when all its samples are known. MDSWriter keeps each as an object of
its own, joins them to one, and joins that to the head: three copies into memory that the kernel
has to find and fill with zeros first, which costs more than the copies themselves.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

HASHES = ["xxh64"]
"""Of every shard. It is what training compares unless its yaml says otherwise, and it misses a
damage once in 2⁶⁴. Data sets of before also have a SHA-1, which takes six to thirty times as long;
nor was that ever a protection from somebody who means harm, who would change the index as well."""

U32 = 4
"""Bytes of a number in a shard."""


class ShardFormat:
    """How the samples of some columns become the bytes of a shard.

    Args:
        columns: Column name → MDS encoding.
        size_limit: Bytes of a shard at most, as the shard says it.
    """

    def __init__(self, columns: Mapping[str, str], size_limit: int) -> None:
        self._names = sorted(columns)
        self._encoders = [_encoder(columns[name]) for name in self._names]
        self._sizes = [_fixed_size(columns[name]) for name in self._names]
        self.config: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": HASHES,
            "size_limit": size_limit,
            "column_names": self._names,
            "column_encodings": [columns[name] for name in self._names],
            "column_sizes": self._sizes,
        }
        """What an index says of each shard, beside what is its own."""
        self._config = json.dumps(self.config, sort_keys=True).encode()

    def encode(self, sample: Mapping[str, Any]) -> list[bytes]:
        """A sample's values, in the order in which a shard has them.

        Raises:
            ValueError: If a value has not the length that its column's encoding fixes.
        """
        values = [encode(sample[n]) for n, encode in zip(self._names, self._encoders, strict=True)]
        for name, value, size in zip(self._names, values, self._sizes, strict=True):
            if size not in (None, len(value)):
                raise ValueError(f"{name} takes {len(value)} bytes, and its encoding {size}")
        return values

    def lengths(self, values: Sequence[bytes]) -> bytes:
        """What stands before a sample's values."""
        sizes = [len(v) for v, size in zip(values, self._sizes, strict=True) if size is None]
        return struct.pack(f"<{len(sizes)}I", *sizes)

    def sample_bytes(self, values: Sequence[bytes]) -> int:
        """Bytes that a sample takes in a shard, its place in the head among them."""
        return U32 + U32 * self._sizes.count(None) + sum(map(len, values))

    @property
    def empty_bytes(self) -> int:
        """Bytes of a shard of no samples."""
        return 2 * U32 + len(self._config)

    def head(self, ends: Sequence[int]) -> bytes:
        """What stands before a shard's samples.

        Args:
            ends: For each sample, where it ends, in bytes from the start of the first.
        """
        first = self.empty_bytes + U32 * len(ends)
        offsets = np.array([0, *ends], "<u4") + np.uint32(first)
        return struct.pack("<I", len(ends)) + offsets.tobytes() + self._config


class ShardBuffer:
    """Samples that wait until their shard is full.

    Its memory is kept for the next shard, also of another writer: what was used before costs
    nothing to use again. Sent to another process, it is empty there.
    """

    def __init__(self) -> None:
        self._memory = BytesIO()
        self.ends: list[int] = []
        """For each sample, where it ends, in bytes."""

    def __reduce__(self) -> tuple[type[ShardBuffer], tuple[()]]:
        return ShardBuffer, ()

    def add(self, *parts: bytes) -> None:
        """Append a sample, given in parts."""
        for part in parts:
            self._memory.write(part)
        self.ends.append(self._memory.tell())

    def clear(self) -> None:
        """Forget all samples."""
        self._memory.seek(0)
        self.ends.clear()

    def write(self, path: Path, head: bytes) -> tuple[int, dict[str, str]]:
        """Write a head and all samples to a new file.

        Returns:
            The file's bytes, and its hashes by their names.
        """
        hashes = {name: getattr(xxhash, name)(head) for name in HASHES}
        with (
            self._memory.getbuffer() as memory,
            memory[: self._memory.tell()] as body,
            path.open("wb", buffering=0) as file,
        ):
            for digest in hashes.values():
                digest.update(body)
            for part in (head, body):
                while part:  # the kernel writes 2 GiB at a time, at most
                    part = part[file.write(part) :]
        size = len(head) + self._memory.tell()
        return size, {name: digest.hexdigest() for name, digest in hashes.items()}


def _encoder(encoding: str) -> Callable[[Any], bytes]:
    """What makes bytes of a value."""
    if encoding == "str":
        return str.encode
    if encoding == "bytes":
        return bytes
    from streaming.base.format.mds.encodings import mds_encode  # takes seconds: it imports torch

    return partial(mds_encode, encoding)


def _fixed_size(encoding: str) -> int | None:
    """The bytes of any value; None where they depend on the value."""
    if encoding in ("str", "bytes"):
        return None
    from streaming.base.format.mds.encodings import get_mds_encoded_size

    return get_mds_encoded_size(encoding)
