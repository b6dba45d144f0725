"""How many bytes caches of shards have yet to take, disk by disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class DiskNeed(NamedTuple):
    """Caches on one disk, and what will be written to them."""

    folders: list[Path]
    missing: int


def disk_needs(caches: Mapping[Path, Mapping[str, int]], limit: int | None) -> list[DiskNeed]:
    """Count what will be written to the caches of a data set in an epoch, at most, at a time.

    Args:
        caches: Folders, which need not exist; of each the names of the shards' files and their
            bytes, as the cache keeps them. A file that is there with its size counts as there.
        limit: Bytes that the caches may hold together; None for all.

    Returns:
        One for each disk that some of them are on.
    """
    disks: dict[int, list[Path]] = defaultdict(list)
    for folder in caches:
        disks[existing(folder).stat().st_dev].append(folder)
    return [
        DiskNeed(
            folders, _missing({f / n: s for f in folders for n, s in caches[f].items()}, limit)
        )
        for folders in disks.values()
    ]


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _missing(files: Mapping[Path, int], limit: int | None) -> int:
    present = sum(size for path, size in files.items() if _size(path) == size)
    total = sum(files.values())
    return max(0, (total if limit is None else min(total, limit)) - present)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
