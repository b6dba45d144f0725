"""What a killed run leaves on a machine, and how the next one gets past it.

streaming 0.13 keeps its bookkeeping in named blocks of shared memory. A run that was killed may
leave them behind, and the next run that reads into the same folder is refused. streaming's own
`clean_stale_shared_memory` hangs unless every rank calls it, and takes the blocks of other jobs'
data sets away as well.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from streaming.base.constant import LOCALS
from streaming.base.shared.prefix import _unpack_locals

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
ORPHAN_SECONDS = 10.0
"""How long to wait for the processes of a killed run to notice it."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(worker_id: int = 0) -> None:
    """End this process when its parent does (Linux); a loader's `worker_init_fn`.

    A torch worker looks for its parent every five seconds only, and holds shared memory until then.
    """
    del worker_id
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def partial_path(target: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.partial")


def remove_partials(folder: Path) -> None:
    """Delete what processes of this machine that are gone had not finished writing."""
    pattern = re.compile(rf"\..*\.{re.escape(socket.gethostname())}-(\d+)\.partial")
    for path in folder.glob(".*.partial"):
        match = pattern.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            path.unlink(missing_ok=True)


def release_folders(caches: Iterable[str], in_place: Iterable[str] = ()) -> None:
    """Free what killed runs hold of the folders that shards are read from.

    Blocks that a living process uses, and those of other folders, are left alone. To be called by
    one rank of a node, before it opens a data set.

    Args:
        caches: Folders that shards are downloaded to; one run at a time may use them.
        in_place: Folders that shards are read from where they are.

    Raises:
        ValueError: A living process reads into one of `caches`.
    """
    exclusive = {os.path.abspath(folder) for folder in caches}
    ours = exclusive | {os.path.abspath(folder) for folder in in_place}
    for folder in exclusive:
        remove_partials(Path(folder))
    if not SHARED_MEMORY.is_dir():
        return
    for block in sorted(SHARED_MEMORY.glob(f"[0-9]*_{LOCALS}")):
        taken = ours & set(_folders_of(block))
        if not taken:
            continue
        prefix = block.name.removesuffix(LOCALS)
        if users := _wait_until_unused(prefix):
            if taken & exclusive:
                raise ValueError(
                    f"{', '.join(sorted(taken))} is in use by process {users[0]}; end that run or "
                    "give this one a cache of its own (train_loader.dataset.local)"
                )
            continue
        stale = sorted(SHARED_MEMORY.glob(f"{prefix}*"))
        for path in stale:
            path.unlink(missing_ok=True)
        log.info(
            "Freed %d blocks of shared memory that an earlier run left for %s.",
            len(stale),
            ", ".join(sorted(taken)),
        )


def _folders_of(block: Path) -> list[str]:
    """The folders that a block of streaming's names; none where it is not readable as one."""
    try:
        return _unpack_locals(block.read_bytes())[0]
    except (OSError, ValueError, IndexError):
        return []


def _wait_until_unused(prefix: str) -> list[int]:
    """Wait for the processes that use blocks of a prefix to end; return those that do not."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (users := _users_of(prefix)) and time.monotonic() < deadline:
        if not any(_is_orphan(pid) for pid in users):
            break
        time.sleep(0.1)
    return users


def _users_of(prefix: str) -> list[int]:
    """Processes that have blocks of a prefix mapped."""
    needle = f" {SHARED_MEMORY}/{prefix}"
    users = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        pid = int(maps.parent.name)
        try:
            if needle in maps.read_text(errors="replace"):
                users.append(pid)
        except OSError:  # it ended, or is another user's
            continue
    return sorted(users)


def _is_orphan(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    parent = int(stat.rpartition(")")[2].split()[1])
    return parent == 1 or not _is_alive(parent)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
