"""Shards that were compressed, unpacked to as many bytes as their index says and no more.

streaming 0.13 unpacks a whole shard in memory, whatever its size: 67 kB of zstd can hold 2 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_composer.mds.index import Compression

_STREAMS = {"br": "brotli", "bz2": "bz2", "gz": "gzip", "zstd": "zstd"}
"""pyarrow's names of what can be read piece by piece."""
_CHUNK = 1 << 20


class _DamageError(Exception):
    """A file is not what its algorithm makes."""


def decompress(source: Path, target: Path, compression: Compression, size: int) -> str | None:
    """Unpack a file; what is written never has more than `size` bytes.

    Args:
        source: The compressed file, of a checked size.
        target: The file to write.
        compression: How it was compressed.
        size: Bytes that it should have.

    Returns:
        What is wrong with it; None where `target` has `size` bytes.
    """
    written = 0
    chunks = _snappy(source, size) if compression == "snappy" else _stream(source, compression)
    with target.open("wb") as file:
        try:
            for chunk in chunks:
                written += len(chunk)
                if written > size:
                    return f"it unpacks to more than the {size} bytes that the index says"
                file.write(chunk)
        except _DamageError as error:
            return f"it does not unpack ({error})"
    return None if written == size else f"it unpacks to {written} bytes, the index says {size}"


def _stream(source: Path, compression: Compression) -> Iterator[bytes]:
    import pyarrow

    with source.open("rb") as file:
        stream = pyarrow.CompressedInputStream(file, _STREAMS[compression])
        while True:
            try:
                chunk = stream.read(_CHUNK)
            except (OSError, ValueError) as error:  # pyarrow's, of a damaged stream
                raise _DamageError(error) from error
            if not chunk:
                return
            yield chunk


def _snappy(source: Path, size: int) -> Iterator[bytes]:
    """Snappy has no pieces; it begins with the number of bytes that it unpacks to."""
    import pyarrow

    data = source.read_bytes()
    length = 0
    for shift, byte in zip(range(0, 35, 7), data, strict=False):
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    if length != size:
        raise _DamageError(f"it says that it unpacks to {length} bytes, the index says {size}")
    try:
        yield pyarrow.decompress(data, decompressed_size=size, codec="snappy", asbytes=True)
    except (OSError, ValueError) as error:
        raise _DamageError(error) from error
