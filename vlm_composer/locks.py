"""Locks of one machine: files that the kernel unlocks with the process that holds them.

A lock therefore tells what a killed run left from what a living one uses. Forked children hold it
as well, so that it outlives a rank whose loader workers have not ended. filelock 4.2 closes it in
them, and has no shared lock for `check_free`.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import re
import socket
import stat
import tempfile
import time
from pathlib import Path

log = logging.getLogger(__name__)

ORPHAN_SECONDS = 40.0
"""How long to wait for the processes of a killed run to end: they have 30 s to save."""
_HOLDER = re.compile(r"process [0-9]{1,20} on [\w.-]{1,255}", re.ASCII)
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_held: dict[Path, Lock] = {}
"""Locks that this process holds until it lets go of them or ends."""


class Lock:
    """A file that one process holds at a time.

    Args:
        path: The file, made where it is missing, in a folder that exists. A symbolic link is
            refused.
        seconds: How long to wait for another holder; `math.inf` for as long as it takes.

    Raises:
        BlockingIOError: Another process holds it; the message names the process.
        OSError: The file cannot be opened, or its file system has no locks.
    """

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        self.path = path
        deadline, waits = time.monotonic() + seconds, False
        while not self._try():
            if time.monotonic() >= deadline:
                raise BlockingIOError(errno.EAGAIN, f"held by {holder_of(path)}")
            if not waits:
                level = logging.INFO if seconds == math.inf else logging.WARNING
                log.log(level, "%s is held by %s: waiting.", path, holder_of(path))
            waits = True
            time.sleep(0.1)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Delete the file and unlock it."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)

    def _try(self) -> bool:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(self._file, self.path):  # or its last holder has just deleted it
                return True
        except BlockingIOError:
            pass
        except BaseException:
            os.close(self._file)
            raise
        os.close(self._file)
        return False


def hold(path: Path, what: str, advice: str) -> bool:
    """Hold a lock until `let_go`, or until this process ends.

    Args:
        path: The lock's file, in a folder that exists.
        what: The thing that it protects, for messages.
        advice: What the user can do where another process holds it.

    Returns:
        Whether it is new to this process, which then had no part in what the lock protects.

    Raises:
        ValueError: Another process held it for `ORPHAN_SECONDS`.
        OSError: The file cannot be opened.
    """
    if path in _held:
        return False
    try:
        _held[path] = Lock(path, ORPHAN_SECONDS)
    except BlockingIOError:
        raise ValueError(_in_use(path, what, advice)) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        log.warning("%s: its file system has no locks, so a second run is not noticed.", what)
    return True


def let_go(path: Path) -> None:
    """Unlock what `hold` has locked, if this process holds it."""
    if path in _held:
        _held.pop(path).release()


def check_free(path: Path, what: str, advice: str) -> bool:
    """Return and raise what `hold` would, at once and without a change."""
    if path in _held or not path.exists():
        return path not in _held
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(_in_use(path, what, advice)) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(file)
    return True


def holder_of(path: Path) -> str:
    """Return the process that holds a lock, as it wrote it."""
    try:
        found = _HOLDER.match(path.read_text(errors="replace"))
    except OSError:
        found = None
    return found[0] if found else "another process"


def user_folder() -> Path:
    """Return this user's own folder under TMPDIR, for locks whose names others could guess.

    Raises:
        PermissionError: Another user has made it, or it is not a folder.
    """
    folder = Path(tempfile.gettempdir(), f"vlm_composer-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(
            f"{folder} is not a folder of this user ({os.getuid()}) but of user {found.st_uid}, or "
            "a link; remove it, or set TMPDIR to a folder of your own"
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _in_use(path: Path, what: str, advice: str) -> str:
    return f"{what} is in use by {holder_of(path)}; {advice}"


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
