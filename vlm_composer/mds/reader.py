"""Samples out of MDS shards whose index was checked: the one reader of them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds.reader import MDSReader

from vlm_composer.mds.encodings import SampleDecoder
from vlm_composer.mds.index import INDEX_FILE, Index, ShardFile, read_index

_PLACE = struct.Struct("<2I")
"""Of a sample in a shard: where it begins and where it ends."""


class RecordReader(MDSReader):
    """streaming 0.13's reader with four calls to the kernel a record in place of ten, with its
    columns looked up once (0.02 ms less, of 0.07), and with decoders of our own."""

    def __init__(self, **shard: Any) -> None:
        super().__init__(**shard)
        self._path = os.path.join(self.dirname, self.split, self.raw_data.basename)
        columns = dict(zip(self.column_names, self.column_encodings, strict=True))
        self._decode = SampleDecoder(columns)

    def get_sample_data(self, idx: int) -> bytes:
        """Read a sample.

        Raises:
            FileNotFoundError: The shard was evicted; streaming fetches it again.
            OSError: It ends too early, or places the sample outside itself.
        """
        shard = os.open(self._path, os.O_RDONLY)
        try:
            place = os.pread(shard, _PLACE.size, 4 * (1 + idx))
            begin, end = _PLACE.unpack(place) if len(place) == _PLACE.size else (0, 0)
            if not 4 * (2 + self.samples) <= begin < end <= self.raw_data.bytes:
                raise OSError(
                    f"{self._path} places sample {idx} at bytes {begin} to {end} of "
                    f"{self.raw_data.bytes}; convert the data set again"
                )
            data = os.pread(shard, end - begin, begin)
        finally:
            os.close(shard)
        if len(data) < end - begin:
            raise OSError(f"{self._path} ends within sample {idx}, at {begin + len(data)} of {end}")
        return data

    def get_item(self, idx: int) -> dict[str, Any]:
        """Read a sample and take it apart.

        Raises:
            OSError: It is not what the index says of its columns.
        """
        data = self.get_sample_data(idx)
        try:
            return self.decode_sample(data)
        except ValueError as error:
            raise OSError(f"sample {idx}: {error}") from error

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """Take a sample apart into its columns.

        Raises:
            ValueError: It is not one of these columns.
        """
        try:
            return self._decode(data)
        except ValueError as error:
            raise ValueError(
                f"{self._path} holds a sample that cannot be decoded: {error}; convert the data "
                "set again"
            ) from error


def readers(index: Index, folder: str, split: str = "") -> list[RecordReader]:
    """Make the readers of a data set's shards; nothing is opened yet.

    Args:
        index: Of the data set.
        folder: Where its shards will be.
        split: The folder below it.
    """
    names, encodings = list(index.columns), list(index.columns.values())
    return [
        RecordReader(
            dirname=folder,
            split=split,
            column_encodings=encodings,
            column_names=names,
            column_sizes=[None] * len(names),  # the decoder knows them
            compression=shard.compression,
            hashes=sorted(shard.raw.hashes),
            raw_data=_info(shard.raw),
            samples=shard.samples,
            size_limit=None,
            zip_data=shard.zipped and _info(shard.zipped),
        )
        for shard in index.shards
    ]


def read_folder(folder: Path) -> Iterator[dict[str, Any]]:
    """Read all samples of a data set in a folder, in order.

    Raises:
        IndexFaultError: Its index cannot be used.
        OSError: A file cannot be read.
    """
    for reader in readers(read_index(folder / INDEX_FILE), str(folder)):
        yield from (reader[number] for number in range(len(reader)))


def _info(file: ShardFile) -> FileInfo:
    return FileInfo(file.basename, file.bytes, dict(file.hashes))
