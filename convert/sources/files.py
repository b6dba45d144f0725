"""Files of a folder or a bucket that are read in place."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from convert.errors import ConversionError
from vlm_composer.outages import MissingFileError, StoreError, ride_out
from vlm_composer.storage import Store, open_store

PATIENCE = 60.0
"""Seconds that a store may be away while it is read."""

_BUFFER_BYTES = 1 << 20
_BUCKET_BUFFER_BYTES = 1 << 23
"""Of what is read from one end to the other: a request of a bucket takes its time."""


class InputFile(io.RawIOBase):
    """A file that several threads can read at places of their own, besides what a file can do.

    Args:
        location: A path, or the URL of an object.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, location: str) -> None:
        self._position = 0
        self._file: io.FileIO | None = None
        self._read: Callable[[int, int], bytes]
        if is_url(location):
            store, name = open_object(location)
            self.size = size_of(location)
            self._read = lambda offset, count: read_object(store, name, count, offset)
        else:
            file = self._file = io.FileIO(location)
            self.size = os.fstat(file.fileno()).st_size
            self._read = lambda offset, count: os.pread(file.fileno(), count, offset)

    def read_at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, fewer only where the file ends."""
        parts = []
        count = min(count, max(self.size - offset, 0))
        while count > 0 and (part := self._read(offset, count)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def buffered(self) -> io.BufferedReader:
        """The same file, to be read from one end to the other."""
        return io.BufferedReader(self, _BUFFER_BYTES if self._file else _BUCKET_BUFFER_BYTES)

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
        if self._file is not None:
            self._file.close()
        super().close()


def is_url(location: str) -> bool:
    """Whether it is a bucket's and not a folder's."""
    return "://" in location


def open_object(url: str) -> tuple[Store, str]:
    """The store that an object is in, and its name there.

    Raises:
        ConversionError: If the URL is malformed or no credentials are found.
    """
    folder, _, name = url.rpartition("/")
    return open_bucket(folder), name


@lru_cache(maxsize=64)
def open_bucket(url: str) -> Store:
    """A store; one client serves a whole process.

    Raises:
        ConversionError: If the URL is malformed or no credentials are found.
    """
    try:
        return open_store(url)
    except StoreError as error:
        raise ConversionError(str(error)) from error


def read_object(store: Store, name: str, count: int, start: int = 0) -> bytes:
    """Part of an object, as `Store.read` has it.

    Raises:
        MissingFileError: If there is none.
        ConversionError: If the store stays away or refuses.
    """
    what = f"read {name} of {store.url}"
    try:
        return ride_out(lambda: store.read(name, count, start), what, PATIENCE)
    except MissingFileError:
        raise
    except StoreError as error:
        raise ConversionError(str(error)) from error


def list_bucket(url: str, prefix: str = "") -> dict[str, int]:
    """Names and bytes of a bucket's objects.

    Raises:
        ConversionError: If the store stays away or refuses.
    """
    store = open_bucket(url)
    try:
        return ride_out(lambda: store.sizes(prefix), f"list {url}", PATIENCE)
    except StoreError as error:
        raise ConversionError(str(error)) from error


def size_of(location: str) -> int:
    """Bytes of a file.

    Raises:
        ConversionError: If it is an object that is not there.
        OSError: If it is a file that is not there.
    """
    if not is_url(location):
        return os.stat(location).st_size
    folder, _, name = location.rpartition("/")
    sizes = list_bucket(folder, name)
    if name not in sizes:
        raise ConversionError(f"{location}: there is no such object; check the name")
    return sizes[name]


def stamp(location: str) -> dict[str, Any]:
    """What changes when a file does, for `Source.fingerprint`: of an object, only its size."""
    if is_url(location):
        return {"bytes": size_of(location)}
    status = os.stat(location)
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}
