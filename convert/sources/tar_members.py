"""The members of a tar, one after another: tarfile without its memory and its trust."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Self

from convert.errors import ConversionError

_MAX_HEADER_BYTES = 1 << 20
"""Of a long name or other attributes, which tarfile reads whole."""

_DAMAGE = (
    *(tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError),
    *(OverflowError, RecursionError, IndexError),
)
"""What tarfile raises for a damaged file."""

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class _Member(tarfile.TarInfo):
    """A header, refused where tarfile would end early, go round for ever or fill the memory."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            file: Any = tar.fileobj
            file.seek(tar.offset)
            if not file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.EmptyHeaderError("the end") from error  # type: ignore[attr-defined]
            # Behind the first member, tarfile takes any bytes for the end.
            raise tarfile.ReadError(f"no header: {error}") from error

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        read_whole = self.type in (b"L", b"K", b"x", b"g", b"X")
        if self.size < 0 or (read_whole and self.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of type {self.type!r} for {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def compression_of(file: BinaryIO) -> str | None:
    """How a file is compressed, by what it starts with."""
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def decompressed(file: BinaryIO, compression: str) -> Any:
    """A compressed file as what it holds, to be read once from its start."""
    readers: dict[str, Any] = {
        "gzip": lambda: gzip.GzipFile(fileobj=file),
        "bzip2": lambda: bz2.BZ2File(file),
        "xz": lambda: lzma.LZMAFile(file),  # noqa: SIM115 (its caller closes it)
    }
    return readers[compression]()


def open_tar(file: BinaryIO, path: str) -> tarfile.TarFile:
    """Opens a tar for `members`.

    Args:
        file: It stands where a header starts.
        path: Its name for messages.

    Raises:
        ConversionError: If it is none.
    """
    offset = file.tell()
    try:
        # What names mean is not for the machine's locale to say. Behind the zeros of an end,
        # another tar can follow (`cat a.tar b.tar`): its members are not to be lost.
        return tarfile.open(
            fileobj=file, mode="r:", tarinfo=_Member, encoding="utf-8", ignore_zeros=True
        )
    except ConversionError:  # a store that is away: nothing is known of the tar
        raise
    except _DAMAGE as error:
        raise damaged(path, offset, error) from error


def members(tar: tarfile.TarFile, path: str) -> Iterator[tarfile.TarInfo]:
    """Every member, of which none stays in memory.

    The file is only read forwards, if what a member holds is read before the next is asked for.

    Args:
        tar: From `open_tar`.
        path: Its name for messages.

    Raises:
        ConversionError: If the file is damaged.
    """
    state: Any = tar
    reached = -1
    try:
        while (member := tar.next()) is not None:
            state.members.clear()
            if state.offset <= reached:
                raise tarfile.ReadError("a member that ends before it starts")
            reached = state.offset
            yield member
    except ConversionError:
        raise
    except _DAMAGE as error:
        raise damaged(path, state.offset, error) from error


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> bytes:
    """What the member holds that `members` has just given.

    Raises:
        ConversionError: If the file ends before it does.
    """
    file: Any = tar.fileobj
    try:
        file.seek(member.offset_data)
        data: bytes = file.read(member.size)
        if len(data) < member.size:
            raise EOFError(f"{member.name!r} is cut short")
        return data
    except ConversionError:
        raise
    except _DAMAGE as error:
        raise damaged(path, member.offset_data, error) from error


def damaged(path: str, offset: int, error: Exception) -> ConversionError:
    """What is said of a damaged tar."""
    return ConversionError(
        f"{path} is not a whole tar (at byte {offset}: {type(error).__name__}: {error}): fetch or "
        "make it again"
    )
