"""Parquet files as Hugging Face's datasets are published: an image and its text in each row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from convert.errors import ConversionError, Reason, Rejected
from convert.sources.captions import captioned
from convert.sources.files import InputFile, is_url
from convert.sources.image_places import open_images
from convert.sources.parquet_columns import find_columns
from convert.sources.patterns import list_files, stamp_files
from convert.sources.source import PIECE_ITEMS, Item, Piece

SUFFIXES = (".parquet",)

_BATCH_ROWS = 32
"""Rows in memory at a time, with their images."""

_BUFFER_BYTES = 1 << 20
"""Of each column, read at a time: the columns of a whole row group could be gigabytes."""
_BUCKET_BUFFER_BYTES = 1 << 22


class Parquet:
    """Rows with an image (a struct of `bytes` and `path`, or bytes) and conversations or a caption.

    A caption has no prompt: the prompt is then `<image>` alone. A row without an id is called by
    its file and its number.

    Args:
        pattern: A file, a folder, a pattern, or the URL of such: see `list_files`.
        max_image_bytes: Larger images are rejected.
        name: What it is called among several sources.
        images: Where the images are that rows hold only the paths of: see `open_images`.
    """

    def __init__(
        self, pattern: str, max_image_bytes: int, name: str = "", images: str | None = None
    ) -> None:
        self.name = name
        self._pattern = os.fspath(pattern)
        self._max_image_bytes = max_image_bytes
        self._images = None if images is None else open_images(images, max_image_bytes)
        self._open: _OpenFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def fingerprint(self) -> dict[str, Any]:
        found = {"parquet": self._pattern, **stamp_files(self.files())}
        return found if self._images is None else found | {"images": self._images.fingerprint()}

    def files(self) -> list[str]:
        if self._images is not None:
            self._images.check()
        return list_files(self._pattern, SUFFIXES)

    def pieces(self, file: str) -> Iterator[Piece]:
        with _OpenFile(file) as opened:
            if not opened.num_rows:
                return
            row = 0
            for group, rows in enumerate(opened.group_rows):
                for start in range(0, rows, PIECE_ITEMS):
                    count = min(PIECE_ITEMS, rows - start)
                    where = {"file": file, "group": group, "start": start, "row": row + start}
                    yield Piece(count, where)
                row += rows

    def read(self, piece: Piece, wanted: Sequence[bool]) -> Iterator[Item]:
        file, row = piece.where["file"], piece.where["row"]
        if self._open is None or self._open.file != file:
            self._close_file()
            self._open = _OpenFile(file)
        opened = self._open
        for index, value in opened.rows(piece.where["group"], piece.where["start"], wanted):
            yield self._item(index, value, opened, row + index)

    def close(self) -> None:
        self._close_file()
        if self._images is not None:
            self._images.close()

    def _close_file(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _item(self, index: int, value: dict[str, Any], opened: _OpenFile, row: int) -> Item:
        stem = os.path.basename(opened.file).removesuffix(SUFFIXES[0])
        image, text = value[opened.image_column], value[opened.text_column]
        sample_id = value[opened.id_column] if opened.id_column else None
        if sample_id is None:
            sample_id = f"{stem}-{row:08}"
        path = image.get("path") if isinstance(image, dict) else image
        path = path if isinstance(path, str) and path else None

        fields: dict[str, Any] | Rejected
        if isinstance(text, Rejected):
            fields = text
        elif isinstance(sample_id, Rejected):
            fields = sample_id
        else:
            fields = captioned(sample_id, path or f"{stem}{SUFFIXES[0]}:{row}", text)
            if opened.text_column == "conversations":
                fields["conversations"] = text
        return Item(index, fields, self._image(image, path))

    def _image(self, image: Any, path: str | None) -> bytes | Rejected:
        data = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(data, Rejected):
            return data
        if isinstance(data, bytes):
            if len(data) <= self._max_image_bytes:
                return data
            return Rejected(
                Reason.TOO_LARGE,
                f"{len(data)} bytes, more than a shard holds ({self._max_image_bytes})",
            )
        if path is None:
            return Rejected(Reason.MISSING_IMAGE, "the row holds no image")
        if self._images is None:
            return Rejected(
                Reason.MISSING_IMAGE,
                f"the row holds only the path {path[:200]!r}: give --images, where it starts from",
            )
        (found,) = self._images.read_many([path])
        return found


class _OpenFile:
    """A file that is read, mostly row after row."""

    def __init__(self, file: str) -> None:
        from pyarrow.parquet import ParquetFile

        self.file = file
        self._input = InputFile(file)
        try:
            with self._damage():
                size = _BUCKET_BUFFER_BYTES if is_url(file) else _BUFFER_BYTES
                self._parquet = ParquetFile(self._input, pre_buffer=False, buffer_size=size)
                metadata = self._parquet.metadata
                self.num_rows = metadata.num_rows
                self.group_rows = [
                    metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)
                ]
                schema = self._parquet.schema_arrow
            self.image_column, self.text_column, self.id_column = find_columns(schema, file)
        except BaseException:
            self._input.close()
            raise
        self._batches: Iterator[Any] | None = None
        self._batch: Any = None
        self._at = (-1, 0, 0)
        """The row group that is read, the row of it that `_batch` starts with, and the next."""

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._batches = self._batch = None
        self._parquet.close()
        self._input.close()

    def rows(
        self, group: int, start: int, wanted: Sequence[bool]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The wanted rows of a row group from `start` on, with their places in `wanted`."""
        for index, want in enumerate(wanted):
            if want:
                self._go_to(group, start + index)
                row = start + index - self._at[1]
                yield index, {name: _value(self._batch, name, row) for name in self._names()}

    def _go_to(self, group: int, row: int) -> None:
        """Makes the batch with this row the current one. Backwards is from the group's start."""
        columns = self._names()
        if self._at[0] != group or row < self._at[1] or self._batches is None:
            with self._damage():
                self._batches = self._parquet.iter_batches(
                    _BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
                )
            self._batch, self._at = None, (group, 0, 0)
        while row >= self._at[2]:
            with self._damage():
                self._batch = next(self._batches, None)
                if self._batch is None:
                    self._batches = None
                    raise ValueError(f"row group {group} ends before row {row}")
            self._at = (group, self._at[2], self._at[2] + self._batch.num_rows)

    def _names(self) -> list[str]:
        names = (self.image_column, self.text_column, self.id_column)
        return [name for name in names if name]

    @contextmanager
    def _damage(self) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except ConversionError:
            raise
        except (ArrowException, OSError, ValueError, MemoryError) as error:
            raise ConversionError(
                f"{self.file} is not a whole Parquet file ({type(error).__name__}: "
                f"{str(error)[:300]}): fetch or make it again"
            ) from error


def _value(batch: Any, column: str, row: int) -> Any:
    try:
        return batch.column(column)[row].as_py()
    except UnicodeDecodeError as error:
        return Rejected(Reason.NOT_UNICODE, f"{column}: {error}")
