"""Files that are read in place."""

from __future__ import annotations

import io
import os
from typing import Any

_BUFFER_BYTES = 1 << 20


class InputFile(io.RawIOBase):
    """A file that several threads can read at places of their own, besides what a file can do.

    Args:
        location: A path.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, location: str) -> None:
        self._file = open(location, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self.size = os.fstat(self._file.fileno()).st_size
        self._position = 0

    def read_at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, fewer only where the file ends."""
        parts = []
        while count > 0 and (part := os.pread(self._file.fileno(), count, offset)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def buffered(self) -> io.BufferedReader:
        """The same file, to be read from one end to the other."""
        return io.BufferedReader(self, _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def stamp(location: str) -> dict[str, Any]:
    """What changes when a file does, for `Source.fingerprint`."""
    status = os.stat(location)
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}
