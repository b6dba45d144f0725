"""A LLaVA JSON or JSON Lines file: the form LLaVA-Pretrain is published in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from convert.errors import ConversionError, Rejected
from convert.sources.captions import other_encoding
from convert.sources.files import InputFile, stamp
from convert.sources.image_places import open_images
from convert.sources.image_stores import ImageStore, image_name
from convert.sources.json_lines import decode_line, lines
from convert.sources.json_list import decode_items, item_spans
from convert.sources.source import PIECE_ITEMS, Item, Piece

LINES_SUFFIXES = (".jsonl", ".ndjson")

_PIECE_BYTES = 1 << 24
"""A piece ends before an item that would make it longer: it is read as a whole."""


class LlavaJson:
    """Items `{"id", "image", "conversations"}` in one file, and their images in another place.

    Args:
        json_path: A file or an object that holds one JSON list, or, named .jsonl, one item a line.
        images: What the items' `image` paths start from: see `open_images`.
        max_image_bytes: Larger images are rejected without being read.
        name: What it is called among several sources.
    """

    def __init__(
        self,
        json_path: str | Path,
        images: str | Path | ImageStore,
        max_image_bytes: int,
        name: str = "",
    ) -> None:
        self.name = name
        self._path = os.fspath(json_path)
        self._has_lines = self._path.endswith(LINES_SUFFIXES)
        self._images = (
            images
            if isinstance(images, ImageStore)
            else open_images(os.fspath(images), max_image_bytes)
        )
        self._file: InputFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def fingerprint(self) -> dict[str, Any]:
        return {
            "json": self._path,
            **stamp(self._path),
            "images": self._images.fingerprint(),
        }

    def files(self) -> list[str]:
        self._open()
        self._images.check()
        return [self._path]

    def pieces(self, file: str) -> Iterator[Piece]:
        reader = InputFile(file).buffered()
        with reader:
            if encoding := other_encoding(reader.peek(4)[:4]):
                raise ConversionError(f"{file} is a text of {encoding}: save it as UTF-8")
            if self._has_lines:
                spans: Iterable[tuple[int, int]] = ((a, b) for a, b, _ in lines(reader))
            else:
                spans = item_spans(reader, file)
            first, last, count = 0, 0, 0
            for start, end in spans:
                if count == PIECE_ITEMS or (count and end - first > _PIECE_BYTES):
                    yield Piece(count, {"start": first, "end": last})
                    count = 0
                if count == 0:
                    first = start
                last, count = end, count + 1
        if count == 0:
            raise ConversionError(f"{file} holds no items: there is nothing to convert")
        yield Piece(count, {"start": first, "end": last})

    def read(self, piece: Piece, wanted: Sequence[bool]) -> Iterator[Item]:
        found = [
            (index, fields)
            for index, fields in enumerate(self._fields(piece, wanted))
            if wanted[index]
        ]
        images = self._images.read_many(image_name(fields) for _, fields in found)
        for (index, fields), image in zip(found, images, strict=True):
            yield Item(index, fields, image)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._images.close()

    def _fields(self, piece: Piece, wanted: Sequence[bool]) -> list[object | Rejected]:
        """Every item of a piece; what is not wanted need not be decoded."""
        start, end = piece.where["start"], piece.where["end"]
        try:
            if self._has_lines:
                with InputFile(self._path).buffered() as reader:
                    found = islice(lines(reader, start), piece.count)
                    return [
                        decode_line(line) if want else None
                        for (_, _, line), want in zip(found, wanted, strict=True)
                    ]
            values = list(decode_items(self._open().read_at(start, end - start)))
            if len(values) != piece.count:
                raise ValueError(f"{len(values)} items, not {piece.count}")
            return values
        except ConversionError:  # a store that is away: nothing is known of the file
            raise
        except (ValueError, RecursionError) as error:
            raise ConversionError(
                f"{self._path} is not what it was when this conversion began (from byte {start} to "
                f"{end}: {error}): leave it alone, and start again"
            ) from error

    def _open(self) -> InputFile:
        if self._file is None:
            self._file = InputFile(self._path)
        return self._file
