"""Files of the local disk that appear under their name whole or not at all, and files that a run
adds lines to.

Nothing heavy is imported here, so that conversion needs no model code.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_composer.outages import best_effort

_PARTIAL = re.compile(r"\..*\.([^.]+)-([0-9]{1,7})\.partial", re.DOTALL)
_BOOT_ID = "/proc/sys/kernel/random/boot_id"

_SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "$recycle.bin"}
ABANDONED_SECONDS = 86400
"""A partial file of another machine or container that nobody has written to for so long is
deleted: whether its process lives cannot be seen from here."""


def partial_path(target: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return target.with_name(f".{target.name}.{_machine()}-{os.getpid()}.partial")


def remove_partials(folder: Path) -> None:
    """Delete partial files that processes of this machine left when they were killed, and those of
    other machines that are older than `ABANDONED_SECONDS`."""
    for path in folder.glob(".*.partial"):
        if not (match := _PARTIAL.fullmatch(path.name)):
            continue
        with suppress(FileNotFoundError):  # another process has deleted or renamed it
            if match[1] == _machine():
                abandoned = not _is_alive(int(match[2]))
            else:
                abandoned = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            if abandoned:
                path.unlink()


@functools.cache
def _machine() -> str:
    """Return what a PID is unique within: a host since its last start, and of it a container."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # no Linux
        parts += [Path(_BOOT_ID).read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def move_durably(source: Path, target: Path) -> None:
    """Move a file of the same folder over another so that a crash leaves one or the other whole."""
    with open(source, "rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_hidden(name: str) -> bool:
    """Tell files that a system keeps beside a user's own: hidden ones, AppleDouble (`._x`,
    `__MACOSX/`), checkpoints of notebooks, thumbnails.

    Args:
        name: A path with `/`, relative to what was listed.
    """
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _SYSTEM_NAMES
        for part in name.split("/")
    )


class RunLines:
    """A file that a run adds JSON objects to, one a line, and that a resumed run continues.

    What was added after its checkpoint is cut off, for it comes again. One process writes it. The
    file only describes the run: where it cannot be written, that is a warning.

    Args:
        path: The file; it is made, with its folder, with the first line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._failed = False

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line, whole or not at all; it is in the file when this returns."""
        failed_before, self._failed = self._failed, True
        with best_effort(f"write {self.path}", quiet=failed_before):
            data = (json.dumps(line, default=lambda number: number.item()) + "\n").encode()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(data) < len(data):  # the disk is full
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._failed = False

    def state_dict(self) -> dict[str, int | None]:
        """Where the file ends; None where that cannot be seen."""
        with best_effort(f"look at {self.path}"):
            return {"bytes": self._size()}
        return {"bytes": None}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Cut off what was added after that state."""
        with best_effort(f"cut {self.path}"):
            if (end := state["bytes"]) is not None and self._size() > end:
                os.truncate(self.path, end)

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
