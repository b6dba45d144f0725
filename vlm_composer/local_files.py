"""Files of the local disk that appear under their name whole or not at all, and files that a run
adds lines to.

Nothing heavy is imported here, so that conversion needs no model code.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


class RunLines:
    """A file that a run adds JSON objects to, one a line, and that a resumed run goes on in.

    What was added after its checkpoint is cut off, for it comes again. One process writes it.

    Args:
        path: The file; it is made, with its folder, with the first line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line; it is in the file when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def state_dict(self) -> dict[str, int]:
        """Where the file ends."""
        return {"bytes": self._size()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Cut off what was added after that state."""
        if self._size() > state["bytes"]:
            os.truncate(self.path, state["bytes"])

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
