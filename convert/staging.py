"""Places of the local disk that belong to one run: locks, and folders for what is on its way.

The kernel drops a lock with the process that holds it, however that ends. So a lock tells what a
killed run left from what a living one uses.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from convert.errors import ConversionError

_PREFIX = "vlm-composer-convert-"
_LOCK = "lock"


class Lock:
    """A file that only one process has at a time.

    Args:
        path: Of the file. It is made where it is missing, in a folder that exists.

    Raises:
        BlockingIOError: Another process has it.
        OSError: The file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(self._file, path):  # or its last holder has just deleted it
                    break
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Delete the file, and let go of it."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


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
        holder = path.read_text() or "another process"
        raise ConversionError(
            f"{out} is being written by process {holder}: wait for it, end it, or convert to "
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
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/"):
        try:
            lock = Lock(folder / _LOCK)
        except OSError:  # in use, of another user, or gone meanwhile
            continue
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
