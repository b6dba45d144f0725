"""Parquet files as Hugging Face's datasets are published: an image and its text in each row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from convert.errors import ConversionError, Reason, Rejected
from convert.sources.captions import captioned
from convert.sources.files import is_url
from convert.sources.image_places import open_images
from convert.sources.image_stores import MAX_NAME, too_long
from convert.sources.parquet_columns import find_columns
from convert.sources.parquet_pages import Chunk, LargePageError, PageCheckedFile, most_unpacked
from convert.sources.parquet_values import value_of
from convert.sources.patterns import list_files, stamp_files
from convert.sources.source import PIECE_ITEMS, Item, Piece

SUFFIXES = (".parquet",)

_MOST_ROWS = 1 << 31
"""Of a file, as its footer has them."""

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
        group, start = piece.where["group"], piece.where["start"]
        for index, value in opened.rows(group, start, wanted, self._max_image_bytes):
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
        (found,) = self._images.read_many([path if len(path) <= MAX_NAME else too_long(path)])
        return found


class _OpenFile:
    """A file that is read row after row: one row's values are in memory at a time, and its pages.

    A page's values can be one that is repeated, so that a batch of rows can be any number of times
    larger than the page; the texts of a conversation are for that reason read as a dictionary.
    """

    def __init__(self, file: str) -> None:
        from pyarrow.parquet import ParquetFile

        self.file = file
        self._input = PageCheckedFile(file)
        try:
            with self._damage():
                size = _BUCKET_BUFFER_BYTES if is_url(file) else _BUFFER_BYTES
                options = {"pre_buffer": False, "buffer_size": size}
                parquet = ParquetFile(self._input, **options)
                metadata = self._metadata = parquet.metadata
                self.num_rows = metadata.num_rows
                self.group_rows = [
                    metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)
                ]
                rows_add_up = sum(self.group_rows) == self.num_rows <= _MOST_ROWS
                if not rows_add_up or min(self.group_rows, default=0) < 0:
                    raise ValueError(f"{self.num_rows} rows in {len(self.group_rows)} groups")
                schema = parquet.schema_arrow
            self.image_column, self.text_column, self.id_column = find_columns(schema, file)
            self._leaves = self._find_leaves(parquet.schema)
            self._paths = [leaf.path for leaf in self._leaves.values()]
            turns = [leaf.path for leaf in self._leaves.values() if leaf.max_repetition_level]
            with self._damage():
                self._parquet = ParquetFile(
                    self._input, metadata=metadata, read_dictionary=turns, **options
                )
        except BaseException:
            self._input.close()
            raise
        self._batches: Iterator[Any] | None = None
        self._batch: Any = None
        self._at = (-1, 0)
        """The row group that is read, and its next row."""
        self._fault = (-1, "")
        """The row group that was looked at last, and what is wrong with it."""

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
        self, group: int, start: int, wanted: Sequence[bool], max_bytes: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The wanted rows of a row group from `start` on, with their places in `wanted`."""
        fault = self._group_fault(group)
        for index, want in enumerate(wanted):
            if not want:
                continue
            if fault:
                rejected = Rejected(Reason.TOO_LARGE, fault)
                yield index, dict.fromkeys(self._names(), rejected)
                continue
            self._go_to(group, start + index)
            yield index, {name: value_of(self._batch, name, max_bytes) for name in self._names()}

    def _group_fault(self, group: int) -> str:
        """What no row of a group can be read for: a page too large, by what the footer says.

        A footer that says otherwise is found out when the page is read.
        """
        if self._fault[0] != group:
            fault = ""
            for number, chunk in self._chunks(group):
                column = self._metadata.row_group(group).column(number)
                packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
                if unpacked > most_unpacked(packed):
                    with self._damage():
                        try:
                            self._input.check(chunk)
                        except LargePageError as error:
                            fault = str(error)
            self._fault = (group, fault)
        return self._fault[1]

    def _chunks(self, group: int) -> Iterator[tuple[int, Chunk]]:
        """The columns of a row group that are read."""
        for number, leaf in self._leaves.items():
            column = self._metadata.row_group(group).column(number)
            start, dictionary = column.data_page_offset, column.dictionary_page_offset
            if column.has_dictionary_page and dictionary and 0 < dictionary < start:
                start = dictionary
            end = start + column.total_compressed_size
            yield number, Chunk(start, end, leaf.path, leaf.max_repetition_level > 0)

    def _go_to(self, group: int, row: int) -> None:
        """Makes the batch of this row the current one. Backwards is from the group's start."""
        if self._at[0] != group or row < self._at[1] - 1 or self._batches is None:
            self._input.watch([chunk for _, chunk in self._chunks(group)])
            with self._damage():
                self._batches = self._parquet.iter_batches(
                    1, row_groups=[group], columns=self._paths, use_threads=False
                )
            self._batch, self._at = None, (group, 0)
        while row >= self._at[1]:
            with self._damage():
                self._batch = None
                self._batch = next(self._batches, None)
                if self._batch is None:
                    self._batches = None
                    raise ValueError(f"row group {group} ends before row {row}")
            self._at = (group, self._at[1] + self._batch.num_rows)

    def _find_leaves(self, schema: Any) -> dict[int, Any]:
        """The columns that are stored for what is read, by their numbers in the file."""
        image, text = self.image_column, self.text_column
        flat = (image, f"{image}.bytes", f"{image}.path", text, self.id_column)
        leaves = {}
        for number in range(len(schema)):
            leaf = schema.column(number)
            turn = leaf.path.startswith(f"{text}.") and leaf.name in ("from", "value")
            if leaf.path not in flat and not turn:
                continue
            leaves[number] = leaf
            if leaf.max_repetition_level > turn or leaf.physical_type == "FIXED_LEN_BYTE_ARRAY":
                raise ConversionError(
                    f"{self.file}: the column {leaf.path} is {leaf.physical_type}, "
                    f"{leaf.max_repetition_level} lists deep, not one text or image"
                )
        for name in self._names():
            if not any(leaf.path.split(".")[0] == name for leaf in leaves.values()):
                raise ConversionError(f"{self.file}: the column {name} holds no text and no bytes")
        return leaves

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
