"""What a killed run leaves on a machine, and how the next one gets past it.

streaming 0.13 keeps its bookkeeping in named blocks of shared memory. A run that was killed may
leave them behind, and the next run that reads into the same folder is refused. streaming's own
`clean_stale_shared_memory` hangs unless every rank calls it, and takes the blocks of other jobs'
data sets away as well.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from streaming.base.constant import LOCALS
from streaming.base.shared.prefix import _unpack_locals

from vlm_composer.local_files import remove_partials
from vlm_composer.locks import check_free, hold, user_folder

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
_CACHE_ADVICE = "end that run or give this one a cache of its own (`local` in the yaml)"
_PR_SET_PDEATHSIG = 1


def die_with_parent(worker_id: int = 0) -> None:
    """End this process when its parent does (Linux); a loader's `worker_init_fn`.

    A torch worker looks for its parent every five seconds only, and holds shared memory until then.
    """
    del worker_id
    _send_at_parents_death(signal.SIGKILL)


def stop_with_launcher() -> None:
    """Send this rank SIGTERM when the launcher that started it dies (Linux).

    A launcher that is killed leaves its ranks training, and a restart would race them. A process
    that no launcher started, and that may outlive its shell, is left alone.
    """
    if "LOCAL_RANK" in os.environ:
        _send_at_parents_death(signal.SIGTERM)


def _send_at_parents_death(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def live_as_parent(worker_id: int = 0) -> None:
    """End when the parent does or says so, at no one else's SIGTERM; a loader's `worker_init_fn`.

    Slurm sends SIGTERM to every process of a job. A torch worker ends at one that is not from its
    parent, and then its rank fails instead of saving.
    """
    die_with_parent(worker_id)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_signal, args=(os.getppid(),), daemon=True).start()


def _end_at_parents_signal(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        log.debug("Ignored a SIGTERM that is not from process %d.", parent)
    os._exit(0)


def claim_caches(folders: Iterable[str]) -> None:
    """Take folders that shards are downloaded to for this process, and free what killed runs hold.

    A lock that the kernel drops with its last holder tells living runs from dead ones. That a
    process has a block mapped does not: every streaming process maps the blocks of all others.
    To be called by one rank of a node, before it opens a data set.

    Args:
        folders: Caches; one run of a machine at a time may use each.

    Raises:
        ValueError: A living process of this machine uses one of them.
    """
    ours = {os.path.abspath(folder) for folder in folders}
    _check_writable(ours)
    ours = {folder for folder in ours if hold(_lock_path(folder), folder, _CACHE_ADVICE)}
    for folder in ours:
        remove_partials(Path(folder))
    for taken, stale in _blocks_of(ours):
        for path in stale:
            path.unlink(missing_ok=True)
        log.info(
            "Freed %d blocks of shared memory that an earlier run left for %s.",
            len(stale),
            ", ".join(sorted(taken)),
        )


def look_at_caches(folders: Iterable[str]) -> list[str]:
    """Say what `claim_caches` would free, and change nothing.

    Args:
        folders: As for `claim_caches`.

    Returns:
        A text for each folder that a killed run holds shared memory of.

    Raises:
        ValueError: A living process of this machine uses one of them.
    """
    ours = {os.path.abspath(folder) for folder in folders}
    _check_writable(ours)
    ours = {folder for folder in ours if check_free(_lock_path(folder), folder, _CACHE_ADVICE)}
    return [
        f"{len(stale)} blocks of shared memory of a killed run for {', '.join(sorted(taken))}"
        for taken, stale in _blocks_of(ours)
    ]


def _blocks_of(ours: set[str]) -> Iterator[tuple[set[str], list[Path]]]:
    """streaming's blocks for some of our folders, data set by data set."""
    for block in sorted(SHARED_MEMORY.glob(f"[0-9]*_{LOCALS}")):
        if taken := ours & set(_folders_of(block)):
            yield taken, sorted(SHARED_MEMORY.glob(f"{block.name.removesuffix(LOCALS)}*"))


def _check_writable(folders: Iterable[str]) -> None:
    for folder in folders:
        if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(
                f"{folder} cannot be written by user {os.getuid()}, it belongs to user "
                f"{os.stat(folder).st_uid}; give this run a cache of its own (`local` in the yaml)"
            )


def _lock_path(folder: str) -> Path:
    return user_folder() / f"cache-{hashlib.sha256(folder.encode()).hexdigest()[:16]}.lock"


def _folders_of(block: Path) -> list[str]:
    """The folders that a block of streaming's names; none where it is not readable as one."""
    try:
        return _unpack_locals(block.read_bytes())[0]
    except (OSError, ValueError, IndexError):
        return []
