"""Places of the local disk that belong to one conversion: its lock, and a folder for files on
their way to the destination."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from convert.errors import ConversionError
from vlm_composer.locks import Lock, holder_of

_PREFIX = "vlm-composer-convert-"
_LOCK = "lock"


def lock_destination(path: Path, out: str) -> Lock:
    """Keep other conversions out of a destination.

    Args:
        path: The lock's file.
        out: The destination, for the message.

    Raises:
        ConversionError: Another process of this machine (and, where `path` is on a shared disk
            with locks, of another) writes there.
    """
    try:
        return Lock(path)
    except BlockingIOError:
        raise ConversionError(
            f"{out} is being written by {holder_of(path)}: wait for it, end it, or convert to "
            "another place"
        ) from None


class Scratch:
    """A folder under TMPDIR for one run. Those of runs that were killed are deleted first."""

    def __init__(self) -> None:
        _delete_abandoned()
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            try:
                self._lock = Lock(self.folder / _LOCK)
                return
            except (FileNotFoundError, BlockingIOError):
                pass  # a run that starts just now took it for abandoned

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def _delete_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not _is_own_folder(folder):
            continue
        try:
            lock = Lock(folder / _LOCK)
        except OSError:  # in use, or gone meanwhile
            continue
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _is_own_folder(path: Path) -> bool:
    """Tell a folder of this user from another's, and from a link to anywhere."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
