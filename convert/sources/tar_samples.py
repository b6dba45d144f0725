"""The samples of one WebDataset tar, read forwards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from convert.errors import ConversionError, Reason, Rejected
from convert.sources.files import InputFile
from convert.sources.tar_members import (
    compression_of,
    decompressed,
    members,
    open_tar,
    read_member,
)
from vlm_composer.local_files import is_hidden

IMAGE_ENDS = (*("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),)
TEXT_ENDS = ("txt", "caption", "text")

_MAX_TEXT_BYTES = 1 << 24
_MAX_NAMES = 16
"""Members that a sample remembers the names of."""


@dataclass
class TarSample:
    """What a tar holds of a sample: bytes where they were read, or why they cannot be.

    Members of one key that hold several images are as many samples, none of which can be used: so
    every image of a tar is counted.
    """

    key: str
    offset: int
    """Where its first member's header starts."""

    shares_key: bool
    """Whether the sample before it or behind it has the same key."""

    names: list[str] = field(default_factory=list)
    image_name: str | None = None
    repeated: str | None = None
    """A second member of the same name, which says another text."""

    image: bytes | Rejected | None = None
    text: bytes | Rejected | None = None
    json: bytes | Rejected | None = None

    def held(self) -> str:
        """Its members, for a message."""
        return f"it has {', '.join(name[-100:] for name in self.names)[:200]}"


class TarSamples:
    """A tar that stands before one of its samples.

    Args:
        file: A tar, which may be compressed.
        max_image_bytes: Larger images are not read.

    Raises:
        ConversionError: If it is none.
    """

    def __init__(self, file: str, max_image_bytes: int) -> None:
        self.file = file
        self._max_image_bytes = max_image_bytes
        with InputFile(file).buffered() as start:
            self._compression = compression_of(start)
        if self._compression == "zstd":
            raise ConversionError(f"{file} is compressed by zstd: unpack it with unzstd first")
        self._stream: io.BufferedReader | None = None
        self._waiting: tarfile.TarInfo | None
        self._key: str | None
        self._start(0, 0, False)

    def take(self, read: bool) -> TarSample | None:
        """Passes a sample.

        Args:
            read: Whether what it holds is wanted.

        Returns:
            The sample, or None at the end.
        """
        member = self._waiting
        if member is None:
            return None
        key, end = _key_and_end(member)
        sample = TarSample(key, member.offset, shares_key=key == self._key)
        while member is not None and not (_is_image(end) and sample.image_name is not None):
            self._add(sample, member, end.lower(), read)
            member = next(self._members, None)
            next_key, end = _key_and_end(member) if member else ("", "")
            if next_key != key:
                break
        else:
            sample.shares_key = True
        self._waiting, self._key = member, key
        self._number += 1
        return sample

    def go_to(self, number: int, near: tuple[int, int, bool]) -> None:
        """Stands before a sample.

        Args:
            number: Its number in the tar.
            near: The number of one at or before it, the offset of that, and whether it has the key
                of the sample before it.
        """
        if self._compression:
            if number < self._number:
                self._start(0, 0, False)
        elif not near[0] <= self._number <= number:
            self._start(*near)
        while self._number < number and self.take(read=False) is not None:
            pass

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()

    def _start(self, number: int, offset: int, shares_key: bool) -> None:
        self.close()
        self._number = number
        """That of the sample before which it stands."""
        self._stream = InputFile(self.file).buffered()
        self._stream.seek(offset)
        content: Any = self._stream
        if self._compression:
            content = decompressed(content, self._compression)
        self._tar = open_tar(content, self.file)
        self._members = _named(self._tar, self.file)
        self._waiting = next(self._members, None)
        self._key = _key_and_end(self._waiting)[0] if self._waiting and shares_key else None
        """That of the sample before it, as far as it matters."""

    def _add(self, sample: TarSample, member: tarfile.TarInfo, end: str, read: bool) -> None:
        if (end in TEXT_ENDS or end == "json") and member.name in sample.names:
            sample.repeated = member.name
        if len(sample.names) < _MAX_NAMES:
            sample.names.append(member.name)
        if _is_image(end):
            sample.image_name = member.name
            if read:
                sample.image = self._content(member, self._max_image_bytes)
        elif end in TEXT_ENDS and sample.text is None and read:
            sample.text = self._content(member, _MAX_TEXT_BYTES)
        elif end == "json" and sample.json is None and read:
            sample.json = self._content(member, _MAX_TEXT_BYTES)

    def _content(self, member: tarfile.TarInfo, limit: int) -> bytes | Rejected:
        if not member.isreg() or member.issparse():
            return Rejected(Reason.UNREADABLE_IMAGE, f"{member.name[:200]!r} is not a plain file")
        if member.size > limit:
            return Rejected(
                Reason.TOO_LARGE,
                f"{member.name[:200]!r}: {member.size} bytes, more than fit ({limit})",
            )
        return read_member(self._tar, member, self.file)


def _named(tar: tarfile.TarFile, file: str) -> Iterator[tarfile.TarInfo]:
    """The members that belong to samples: no folders, no hidden files, no notes of WebDataset's."""
    for member in members(tar, file):
        base = member.name.rpartition("/")[2]
        is_note = base.startswith("__") and base.endswith("__")
        if not member.isdir() and not is_hidden(member.name) and not is_note:
            yield member


def _is_image(end: str) -> bool:
    return end.lower().rpartition(".")[2] in IMAGE_ENDS


def _key_and_end(member: tarfile.TarInfo) -> tuple[str, str]:
    """The name up to the first dot of its last part, and what comes after that dot."""
    folder, slash, base = member.name.removeprefix("./").rpartition("/")
    stem, _, end = base.partition(".")
    return f"{folder}{slash}{stem}", end
