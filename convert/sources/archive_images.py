"""Images in a zip or a tar that stays as it is: nothing is ever unpacked to disk."""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from convert.errors import Reason, Rejected
from convert.sources.archive_index import STORED, ArchiveIndex, Entry, write_index
from convert.sources.files import InputFile, is_url, stamp
from convert.sources.image_stores import THREADS, ImageStore, in_window
from convert.sources.scratch import Scratch

_ZIP_HEADER = struct.Struct("<4s22xHH")
_EXTRA_BYTES = 1 << 10
"""Read beyond an entry's header and data at once, for the header's extra fields."""


class ArchiveImages(ImageStore):
    """A zip, or an uncompressed tar, in a folder or a bucket.

    Names are those in the archive: an entry `../../etc/passwd` is a name that no item may have.

    Args:
        location: The archive.
        max_image_bytes: Larger images are rejected without being read.
    """

    def __init__(self, location: str, max_image_bytes: int) -> None:
        self._location = location
        self._max_image_bytes = max_image_bytes
        self._scratch = Scratch()
        self._index: ArchiveIndex | None = None
        self._file: InputFile | None = None
        self._threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None, "_file": None, "_threads": None}

    def check(self) -> None:
        self._open()

    def fingerprint(self) -> dict[str, Any]:
        return {"archive": self._location, **stamp(self._location)}

    def read(self, name: str) -> bytes:
        index, file = self._open()
        return self._read_entry(file, index.find(name))

    def read_many(self, names: Iterable[str | Rejected]) -> Iterator[bytes | Rejected]:
        if not is_url(self._location):
            yield from super().read_many(names)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS)
        index, file = self._open()

        def found() -> Iterator[Any]:
            for name in names:  # the table is this thread's
                try:
                    yield name if isinstance(name, Rejected) else index.find(name)
                except Rejected as rejected:
                    yield rejected.with_traceback(None)

        yield from in_window(self._threads, partial(self._read_entry, file), found())

    def close(self) -> None:
        for opened in (self._index, self._file):
            if opened is not None:
                opened.close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._index = self._file = self._threads = None
        self._scratch.close()

    def _open(self) -> tuple[ArchiveIndex, InputFile]:
        if self._file is None or self._index is None:
            self._file = InputFile(self._location)
            key = hashlib.sha256(self._location.encode(errors="surrogateescape")).hexdigest()[:16]
            path = self._scratch.file(f"{key}.sqlite", partial(write_index, self._location))
            self._index = ArchiveIndex(path)
        return self._index, self._file

    def _read_entry(self, file: InputFile, entry: Entry) -> bytes:
        if entry.fault:
            raise Rejected(Reason.UNREADABLE_IMAGE, f"{entry.name!r} {entry.fault}")
        if max(entry.size, entry.packed) > self._max_image_bytes:
            raise Rejected(
                Reason.TOO_LARGE,
                f"{entry.size} bytes ({entry.packed} in the archive), more than a shard holds "
                f"({self._max_image_bytes})",
            )
        if entry.method == STORED:
            data = file.read_at(entry.offset, entry.size)
            _check(len(data) == entry.size, entry, "goes on after the archive's end")
            return data
        data = _unpack(_packed(file, entry), entry)
        _check(zlib.crc32(data) == entry.crc, entry, "has another checksum than the zip says")
        return data


def _packed(file: InputFile, entry: Entry) -> bytes:
    """What a zip holds of an entry, behind a header of a length that only the header tells."""
    guess = _ZIP_HEADER.size + len(entry.name.encode()) + _EXTRA_BYTES + entry.packed
    data = file.read_at(entry.offset, guess)
    _check(len(data) >= _ZIP_HEADER.size, entry, "lies after the zip's end")
    magic, name_bytes, extra_bytes = _ZIP_HEADER.unpack_from(data)
    _check(magic == b"PK\3\4", entry, "has no header where the zip says")
    start = _ZIP_HEADER.size + name_bytes + extra_bytes
    end = start + entry.packed
    if end > len(data):
        data += file.read_at(entry.offset + len(data), end - len(data))
    _check(end <= len(data), entry, "goes on after the zip's end")
    return data[start:end]


def _unpack(packed: bytes, entry: Entry) -> bytes:
    """Unpacks no more than the entry says that it holds."""
    if entry.method == zipfile.ZIP_STORED:
        _check(entry.packed == entry.size, entry, "is stored, and of two sizes")
        return packed
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = decompressor.decompress(packed, entry.size + 1)
    except zlib.error as error:
        raise Rejected(Reason.UNREADABLE_IMAGE, f"{entry.name!r}: {error}") from error
    _check(
        len(data) == entry.size and decompressor.eof,
        entry,
        f"does not unpack to the {entry.size} bytes that the zip says",
    )
    return data


def _check(holds: bool, entry: Entry, problem: str) -> None:
    if not holds:
        raise Rejected(Reason.UNREADABLE_IMAGE, f"{entry.name!r} {problem}")
