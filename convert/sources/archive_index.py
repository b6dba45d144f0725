"""Where the files of a zip or a tar lie in it: a table on disk, whatever the archive's size."""

from __future__ import annotations

import posixpath
import sqlite3
import stat
import struct
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from convert.errors import ConversionError, Reason, Rejected
from convert.sources.files import InputFile
from convert.sources.tar_members import compression_of, members, open_tar
from vlm_composer.local_files import is_hidden

STORED = -1
"""The `method` of a tar's member: its bytes start at `offset`, without a header of a zip."""

_MAX_LINKS = 8
_WINDOWS = (0, 10, 11)
"""Systems of zips (FAT, NTFS, VFAT) whose file names have no backslashes of their own."""
_BATCH = 10_000


@dataclass(frozen=True)
class Entry:
    """A file in an archive."""

    name: str
    offset: int
    """Where its bytes start in a tar, or its header in a zip."""

    packed: int
    """Bytes that it takes in the archive."""

    size: int
    """Bytes of the file."""

    method: int
    """A zip's method of compression, or `STORED`."""

    crc: int = 0
    fault: str = ""
    """Why it cannot be read, whatever it holds."""

    link: str = ""
    """The file that this is another name of."""


def entry_name(name: str) -> str:
    """The form of a name in which names are compared.

    Raises:
        Rejected: If it leads out of the archive, or no file can have it.
    """
    if name.startswith("/"):
        raise Rejected(Reason.OUTSIDE_IMAGES_ROOT, f"{name[:200]!r} is an absolute path")
    plain = posixpath.normpath(name)
    if plain.startswith("../") or plain in ("..", "."):
        raise Rejected(Reason.OUTSIDE_IMAGES_ROOT, f"{name[:200]!r} leads out")
    if "\0" in plain or not _is_unicode(plain):
        raise Rejected(Reason.UNREADABLE_IMAGE, f"{name[:200]!r}: no file can have such a name")
    return plain


def composed(name: str) -> str:
    """Return a name as Unicode composes it (NFC): macOS stores it decomposed (NFD)."""
    return unicodedata.normalize("NFC", name)


def spellings(name: str) -> list[str]:
    """Return a name, and how it is spelled where Windows separates folders by a backslash."""
    return [name, name.replace("\\", "/")] if "\\" in name else [name]


def missing(name: str, place: str, there: Iterable[str]) -> Rejected:
    """Say that there is no file of a name, and show one that there is.

    Args:
        name: The name.
        place: Where it was looked for.
        there: Names of files, the most alike first.
    """
    example = next((other for other in there if not is_hidden(other)), None)
    shown = f"; there is {example[-200:]!a}" if example else ""
    return Rejected(Reason.MISSING_IMAGE, f"no file {name[-200:]!a} in the {place}{shown}")


def one_of_several(name: str, found: Sequence[str]) -> Rejected:
    """Say that several names are the same but for how Unicode composes them."""
    return Rejected(
        Reason.MISSING_IMAGE,
        f"{name[-200:]!a} could be {' or '.join(ascii(x[-200:]) for x in found[:3])}, which "
        "differ in how Unicode composes them alone; rename one",
    )


def write_index(location: str, path: Path) -> None:
    """Lists an archive.

    Args:
        location: A zip or an uncompressed tar.
        path: The table, which must not exist yet.

    Raises:
        ConversionError: If it is neither, or damaged.
    """
    table = sqlite3.connect(path, isolation_level=None)
    try:
        table.execute("PRAGMA journal_mode=OFF")
        table.execute("PRAGMA synchronous=OFF")  # a table that a crash cut short is never used
        table.execute("BEGIN")
        table.execute(
            "CREATE TABLE entries (name TEXT PRIMARY KEY, offset INT, packed INT, size INT, "
            "method INT, crc INT, fault TEXT, link TEXT, composed TEXT) WITHOUT ROWID"
        )
        table.execute("CREATE INDEX composed ON entries (composed) WHERE composed IS NOT NULL")
        tops: set[str] = set()
        for entry in _entries(location):
            try:
                name = entry_name(entry.name)
            except Rejected:
                continue  # no item may name it
            if len(tops) < 2 and not is_hidden(name):
                tops.add(name.partition("/")[0] if "/" in name else "")
            # Of several files of a name the last is meant, as where an archive is unpacked.
            table.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(name, entry.offset, entry.packed, entry.size, entry.method, entry.crc),
                    *(entry.fault, entry.link, None if composed(name) == name else composed(name)),
                ),
            )
        top = tops.pop() if len(tops) == 1 else ""
        table.execute("CREATE TABLE top (name TEXT)")
        table.execute("INSERT INTO top VALUES (?)", (top,))
        table.execute("COMMIT")
    finally:
        table.close()


class ArchiveIndex:
    """What `write_index` has written. One thread at a time may use it.

    Args:
        path: The table.
    """

    def __init__(self, path: Path) -> None:
        self._table = sqlite3.connect(
            f"file:{path}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        (self._top,) = self._table.execute("SELECT name FROM top").fetchone()

    def find(self, name: str) -> Entry:
        """The file of a name. Where all of an archive lies in one folder, its name may be left out.

        Raises:
            Rejected: If there is none, or the name leads out of the archive.
        """
        entry = self._find(name)
        for _ in range(_MAX_LINKS):
            if not entry.link:
                return entry
            entry = self._find(entry.link)
        raise Rejected(Reason.UNREADABLE_IMAGE, f"{name!r}: more than {_MAX_LINKS} links")

    def close(self) -> None:
        """Closes the table."""
        self._table.close()

    def _find(self, name: str) -> Entry:
        for spelled in spellings(name):
            plain = entry_name(spelled)
            for candidate in (plain, f"{self._top}/{plain}") if self._top else (plain,):
                rows = self._select("name = ?", candidate) or self._select(
                    "name = ? OR composed = ?", *[composed(candidate)] * 2
                )
                if len(rows) == 1:
                    return Entry(*rows[0][:-1])
                if rows:
                    raise one_of_several(name, [row[0] for row in rows])
        near = self._select("name >= ? ORDER BY name LIMIT 20", entry_name(name))
        near += self._select("name < ? ORDER BY name DESC LIMIT 20", entry_name(name))
        raise missing(name, "archive", (row[0] for row in near))

    def _select(self, where: str, *values: str) -> list[Any]:
        return self._table.execute(f"SELECT * FROM entries WHERE {where}", values).fetchall()


def _entries(location: str) -> Iterator[Entry]:
    with InputFile(location).buffered() as file:
        compression = compression_of(file)
        if compression:
            raise ConversionError(
                f"{location} is compressed by {compression}: images are looked up in it, so unpack "
                f"it once, to a tar (with gunzip, bunzip2, unxz or unzstd) or to a folder"
            )
        head = file.read(512)
        is_tar = head[257:262] == b"ustar"  # whose last member may be a zip
        # A zip without its end is one only by how it starts.
        if not is_tar and (head.startswith(b"PK\3\4") or zipfile.is_zipfile(file)):
            yield from _zip_entries(_open_zip(file, location))
        else:
            file.seek(0)
            yield from _tar_entries(open_tar(file, location), location)


def _open_zip(file: BinaryIO, location: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except ConversionError:  # a store that is away: nothing is known of the zip
        raise
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise ConversionError(
            f"{location} is not a whole zip ({error}): fetch or make it again"
        ) from error


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[Entry]:
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        name = _zip_name(info)
        if name.endswith("/"):
            continue
        fault = ""
        if info.flag_bits & 0x1:
            fault = "is encrypted"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            fault = f"is compressed by method {info.compress_type}; make the zip with deflate"
        elif kind not in (0, stat.S_IFREG):
            fault = "is not a file"
        yield Entry(
            name, info.header_offset, info.compress_size, info.file_size,
            info.compress_type, info.CRC, fault,
        )  # fmt: skip


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A name that is not marked as UTF-8 often is: zipfile reads it by the code page of DOS."""
    name = info.orig_filename
    if not info.flag_bits & 0x800 and not name.isascii():
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return _with_slashes(name, info.create_system in _WINDOWS)


def _with_slashes(name: str, by_windows: bool) -> str:
    """A name whose folders a program on Windows may have separated by backslashes."""
    return name.replace("\\", "/") if by_windows or "/" not in name else name


def _tar_entries(tar: tarfile.TarFile, location: str) -> Iterator[Entry]:
    for member in members(tar, location):
        link = fault = ""
        if member.isdir():
            continue
        if member.islnk():
            link = member.linkname
        elif member.issym():
            link = posixpath.join(posixpath.dirname(member.name), member.linkname)
        elif member.issparse() or not member.isreg():
            fault = "is not a plain file"
        yield Entry(
            _with_slashes(member.name, False), member.offset_data, member.size, member.size, STORED,
            fault=fault, link=link,
        )  # fmt: skip


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
