"""What a conversion needs of a source. A new kind of source is one more class like this."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from convert.errors import Rejected
from convert.split import SIDES

PIECE_ITEMS = 256
"""Items of a piece, at most, where a source can be cut anywhere."""

NAMING = f"letters, digits, '-', '_' and '.', other than {' and '.join(SIDES)}"
"""What a source may be called, for messages."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def is_source_name(name: object) -> bool:
    """Whether a source can be called that: the name becomes a folder beside train and eval."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and name.lower() not in SIDES


@dataclass(frozen=True)
class Piece:
    """Consecutive items of a source that can be read without the others.

    How a source is cut depends on the source alone, so that the shards of a conversion do too.
    """

    count: int
    """Items, at least 1."""

    where: dict[str, Any]
    """What the source needs to find them again: JSON values, such as a file and byte offsets."""


@dataclass(frozen=True)
class Item:
    """One item of a source, as it was found."""

    index: int
    """Its place in the piece, from 0."""

    fields: object | Rejected
    """A JSON value that should be `{"id", "image", "conversations"}` (LLaVA's form, `image` being
    the picture's name), or why there is none."""

    image: bytes | Rejected
    """The image file's bytes, or why there are none."""


class Source(Protocol):
    """A sequence of items in one or several files, with their images.

    It is sent to other processes, and opens its files in each of them when it first needs them.
    """

    name: str
    """What it is called in `--sources`; empty where there is but one."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change when the source does: its files' names, sizes and times."""

    def files(self) -> list[str]:
        """The files that `pieces` cuts, in order; they can be cut side by side.

        Raises:
            ConversionError: If there are none, or the images' place does not exist.
        """

    def pieces(self, file: str) -> Iterator[Piece]:
        """Cut one of `files()` into pieces, in order, without holding it in memory.

        Raises:
            ConversionError: If the file cannot be read to its end as what it should be.
        """

    def read(self, piece: Piece, wanted: Sequence[bool]) -> Iterator[Item]:
        """Read a piece's wanted items in order, with their images.

        Args:
            piece: One of `pieces`.
            wanted: For each item of the piece, whether to yield it.

        Raises:
            ConversionError: If the source cannot be read any more. What is wrong with one item is
                said in the item.
        """

    def close(self) -> None:
        """Close what this process has open."""
