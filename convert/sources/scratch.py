"""Files that the processes of a machine make once and share."""

from __future__ import annotations

import atexit
import math
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_composer.locks import Lock


class Scratch:
    """A folder of temporary files, at the same path in every process that it is sent to.

    The one that was not sent deletes it. On another machine (a Spark worker's), whose own temporary
    folder lacks the files, the first process that needs one makes it there again, and deletes it
    when it ends.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir()) / f"convert-{secrets.token_hex(8)}"
        self._is_copy = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_is_copy": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._folder.exists():  # on another machine the temporary folder may be another
            self._folder = Path(tempfile.gettempdir()) / self._folder.name

    def file(self, name: str, make: Callable[[Path], None]) -> Path:
        """A file, made where it is not there yet; other processes wait while one makes it.

        Args:
            name: Its name.
            make: Writes it to the path that it is given.
        """
        path = self._folder / name
        if path.exists():
            return path
        if not self._is_copy or not self._folder.exists():
            atexit.register(self._remove)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with Lock(self._folder / f"{name}.lock", math.inf):
            if not path.exists():
                partial = path.with_name(f"{name}.partial")
                partial.unlink(missing_ok=True)  # of a process that died
                make(partial)
                partial.replace(path)
        return path

    def close(self) -> None:
        """Deletes the folder, unless this is a copy."""
        if not self._is_copy:
            self._remove()

    def _remove(self) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self._folder)
