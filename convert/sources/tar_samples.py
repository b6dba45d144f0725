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

IMAGE_ENDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TEXT_ENDS = ("txt", "caption", "text")

_MAX_TEXT_BYTES = 1 << 24
_MAX_NAMES = 16
"""Members that a sample remembers the names of."""


@dataclass
class TarSample:
    """What a tar holds of a sample: bytes where they were read, or why they cannot be."""

    key: str
    offset: int
    """Where its first member's header starts."""

    names: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    image: bytes | Rejected | None = None
    text: bytes | Rejected | None = None
    json: bytes | Rejected | None = None

    def held(self) -> str:
        """Its members, for a message."""
        return f"it has {', '.join(self.names)[:200]}"


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
        self._start(0, 0)

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
        key = _key_and_end(member)[0]
        sample = TarSample(key, member.offset)
        while member is not None and _key_and_end(member)[0] == key:
            self._add(sample, member, read)
            member = next(self._members, None)
        self._waiting = member
        self._number += 1
        return sample

    def go_to(self, number: int, near: tuple[int, int]) -> None:
        """Stands before a sample.

        Args:
            number: Its number in the tar.
            near: The number of one at or before it, and the offset of that.
        """
        if self._compression:
            if number < self._number:
                self._start(0, 0)
        elif not near[0] <= self._number <= number:
            self._start(*near)
        while self._number < number and self.take(read=False) is not None:
            pass

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()

    def _start(self, number: int, offset: int) -> None:
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

    def _add(self, sample: TarSample, member: tarfile.TarInfo, read: bool) -> None:
        end = _key_and_end(member)[1].lower()
        if len(sample.names) < _MAX_NAMES:
            sample.names.append(member.name[:200])
        if end.rpartition(".")[2] in IMAGE_ENDS:
            if len(sample.images) < _MAX_NAMES:
                sample.images.append(member.name)
            if read and sample.image is None:
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
        if not member.isdir() and not base.startswith(".") and not is_note:
            yield member


def _key_and_end(member: tarfile.TarInfo) -> tuple[str, str]:
    """The name up to the first dot of its last part, and what comes after that dot."""
    folder, slash, base = member.name.removeprefix("./").rpartition("/")
    stem, _, end = base.partition(".")
    return f"{folder}{slash}{stem}", end
