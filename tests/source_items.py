"""What tests of sources read of them, and the places that they put images in."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from convert.errors import Rejected
from convert.record import read_record
from convert.sources.source import Item, Piece, Source
from vlm_composer.data.schema import Record

LIMIT = 1 << 16
"""Bytes of the largest image that the sources of these tests take."""


def pieces_of(source: Source) -> list[Piece]:
    """All pieces, from a copy of the source in which nothing is open."""
    planner = pickle.loads(pickle.dumps(source))
    pieces = [piece for file in source.files() for piece in planner.pieces(file)]
    planner.close()
    return pieces


def items_of(source: Source) -> list[Item]:
    """All items, read by a copy as a worker is sent it."""
    pieces = pieces_of(source)
    worker = pickle.loads(pickle.dumps(source))
    items = [item for piece in pieces for item in worker.read(piece, [True] * piece.count)]
    worker.close()
    return items


def contents_of(source: Source) -> list[Any]:
    """The fields and the image of all items, wherever pieces begin."""
    return [(item.fields, item.image) for item in items_of(source)]


def outcome(item: Item) -> Record | tuple[str, str]:
    """Its record, or the reason and the detail of its rejection."""
    try:
        return read_record(item)[0]
    except Rejected as rejected:
        return rejected.reason, rejected.detail


def outcomes_of(source: Source) -> list[Any]:
    """Of all items, the record or the reason."""
    found = [outcome(item) for item in items_of(source)]
    return [one[0] if isinstance(one, tuple) else one for one in found]


def check_pieces_are_independent(source: Source) -> None:
    """Any piece alone, in any order and with any items wanted, gives what all of them give."""
    pieces = pieces_of(source)
    whole = {}
    for number, piece in enumerate(pieces):
        items = list(source.read(piece, [True] * piece.count))
        assert [item.index for item in items] == list(range(piece.count))
        whole[number] = [outcome(item) for item in items]
    for number in reversed(range(len(pieces))):
        piece = pieces[number]
        wanted = [index % 3 == number % 3 for index in range(piece.count)]
        items = list(source.read(piece, wanted))
        assert [item.index for item in items] == [i for i, want in enumerate(wanted) if want]
        assert [outcome(item) for item in items] == [
            one for one, want in zip(whole[number], wanted, strict=True) if want
        ]
        next(source.read(piece, [True] * piece.count))  # left in the middle
        assert list(source.read(piece, [False] * piece.count)) == []


def zip_of(files: dict[str, bytes], path: Path, **options: Any) -> Path:
    """A zip of these files."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_of(files: dict[str, bytes], path: Path, mode: str = "w") -> Path:
    """A tar of these files."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            add_to_tar(archive, name, data)
    return path


def add_to_tar(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    """One more member."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def images_of(pairs: Any, prefix: str = "") -> dict[str, bytes]:
    """The files below the images root."""
    return {
        prefix + path.relative_to(pairs.images).as_posix(): path.read_bytes()
        for path in sorted(pairs.images.rglob("*"))
        if path.is_file()
    }
