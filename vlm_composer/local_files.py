"""Files of the local disk that appear under their name whole or not at all.

Nothing heavy is imported here, so that conversion needs no model code.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path


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


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
