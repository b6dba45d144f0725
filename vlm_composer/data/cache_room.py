"""How many bytes a cache of shards has yet to take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def bytes_to_fetch(folder: Path, files: Mapping[str, int], limit: int | None) -> int:
    """Count what will be written to a cache in an epoch, at most, at a time.

    Args:
        folder: The cache; it need not exist.
        files: Names of the shards' files and their bytes, as the cache keeps them.
        limit: Bytes that the cache may hold; None for all.

    Returns:
        The bytes. A file that is there with its size counts as there.
    """
    present = sum(size for name, size in files.items() if _size(folder / name) == size)
    total = sum(files.values())
    return max(0, (total if limit is None else min(total, limit)) - present)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
