"""The fixed parts that a conversion is done in: the same for any number of workers, or any engine.

A partition is what one worker converts at a time, what is done again after a crash, and what its
shards are named after. Partitions depend on the sources alone, and so do the shards.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from convert.engine import Engine, Tell
from convert.sources.source import Piece, Source

PARTITIONING = 1
"""Goes up when the same sources would be cut in another way: a run begun before is then refused."""

_PARTS = 32
_FEWEST, _MOST = 1 << 10, 1 << 13
"""Items of a partition: a 32nd of all, within these. More parts than that keep any number of
cores busy to the end; fewer items than that leave shards that are hardly filled."""


@dataclass(frozen=True)
class Partition:
    """Consecutive items of one source."""

    number: int
    """Its place among the partitions of all sources."""

    source: int
    """The place of its source among the sources."""

    start: int
    """Index of its first item among the items of all sources."""

    start_in_source: int
    """Index of its first item within its source."""

    pieces: tuple[Piece, ...]

    @property
    def num_items(self) -> int:
        return sum(piece.count for piece in self.pieces)


class Partitions:
    """Lists the pieces of all sources in a file, and gives them as partitions, as often as asked.

    The list of a billion items has some hundred MB; no more of it is in memory than one partition
    and, while it is made, what the engine is about to hand over.

    Args:
        sources: In order.
        engine: Cuts the files of a source side by side.
        folder: Where the list is kept, on the local disk.

    Raises:
        ConversionError: If a source has no files, or one of them is not what it should be.
        OSError: If a file cannot be read.
    """

    def __init__(self, sources: Sequence[Source], engine: Engine, folder: Path) -> None:
        self._folder = folder
        self._files: list[tuple[int, int]] = []
        """Source and items of each file, in order; its pieces are in the file of its number."""
        for number, source in enumerate(sources):
            first = len(self._files)
            files = source.files()
            self._files += [(number, 0)] * len(files)
            for place, (num_items, pieces) in engine.map(partial(_cut, source), files):
                self._files[first + place] = (number, num_items)
                self._path(first + place).write_bytes(pieces)
        self.source_items = [
            sum(items for of, items in self._files if of == number)
            for number in range(len(sources))
        ]
        self.num_items = sum(self.source_items)
        self._size = min(max(self.num_items // _PARTS, _FEWEST), _MOST)

    def __iter__(self) -> Iterator[Partition]:
        number = start = 0
        for source in range(len(self.source_items)):
            start_in_source = 0
            for pieces in self._grouped(source):
                partition = Partition(number, source, start, start_in_source, tuple(pieces))
                yield partition
                number += 1
                start += partition.num_items
                start_in_source += partition.num_items

    def _grouped(self, source: int) -> Iterator[list[Piece]]:
        group: list[Piece] = []
        count = 0
        for piece in self._pieces(source):
            if group and count + piece.count > self._size:
                yield group
                group, count = [], 0
            group.append(piece)
            count += piece.count
        if group:
            yield group

    def _pieces(self, source: int) -> Iterator[Piece]:
        for file, (of, _) in enumerate(self._files):
            if of != source:
                continue
            text = zlib.decompressobj()
            rest = b""
            with self._path(file).open("rb") as packed:
                while block := packed.read(1 << 14):
                    *lines, rest = (rest + text.decompress(block)).split(b"\n")
                    for line in lines:
                        count, where = json.loads(line)
                        yield Piece(count, where)

    def _path(self, file: int) -> Path:
        return self._folder / f"pieces-{file:05}"


def _cut(source: Source, file: str, tell: Tell) -> tuple[int, bytes]:
    """List the pieces of a file: their items, and a line of JSON for each, compressed."""
    del tell
    packer = zlib.compressobj(1)
    num_items, packed = 0, []
    for piece in source.pieces(file):
        num_items += piece.count
        line: list[Any] = [piece.count, piece.where]
        packed.append(packer.compress(json.dumps(line).encode() + b"\n"))
    return num_items, b"".join([*packed, packer.flush()])
