"""Writes the shards of a side, and the index that makes a data set of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from convert.destination import Destination
from convert.errors import Reason, Rejected
from convert.mds import ShardBuffer, ShardFormat
from convert.split import Side
from vlm_composer.data.schema import MDS_COLUMNS
from vlm_composer.mds.index import INDEX_FILE


class ShardWriter:
    """Writes MDS shards in staging, and publishes each as soon as it is full.

    What streaming's MDSWriter does besides is not needed: only `publish_index` knows all writers
    that share a folder, and only a `Destination` all that is on its way.

    Args:
        destination: Where the folder is.
        folder: "train" or "eval", or a folder that holds one.
        size_limit: Bytes of a shard.
        columns: Column name → MDS encoding.
        partition: Part of the shards' names, where several writers share a folder.
        buffer: Memory of a writer before it, which is done.
    """

    def __init__(
        self,
        destination: Destination,
        folder: str,
        size_limit: int,
        columns: Mapping[str, str] = MDS_COLUMNS,
        partition: int | None = None,
        buffer: ShardBuffer | None = None,
    ) -> None:
        self._destination = destination
        self._size_limit = size_limit
        self._prefix = f"{folder}/shard" if partition is None else f"{folder}/shard.{partition:05}"
        self._format = ShardFormat(columns, size_limit)
        self._buffer = buffer or ShardBuffer()
        self._begin_shard()
        self.shards: list[dict[str, Any]] = []
        """What an index says of the shards that were published."""
        self.published: list[Future[None]] = []
        """For each of them, what is done once it is there."""
        self.num_samples = 0

    @property
    def num_shards(self) -> int:
        """Shards published so far."""
        return len(self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards published so far."""
        return num_bytes(self.shards)

    def write(self, sample: Mapping[str, Any]) -> None:
        """Adds a sample.

        Args:
            sample: A value for every column.

        Raises:
            Rejected: If it is larger than a shard.
        """
        values = self._format.encode(sample)
        size = self._format.sample_bytes(values)
        if size + self._format.empty_bytes > self._size_limit:
            raise Rejected(
                Reason.TOO_LARGE, f"{size} bytes, more than a shard holds ({self._size_limit})"
            )
        if self._num_bytes + size > self._size_limit:
            self._publish_shard()
        self._buffer.add(self._format.lengths(values), *values)
        self._num_bytes += size
        self.num_samples += 1

    def finish(self) -> None:
        """Publishes the last shard."""
        if self._buffer.ends:
            self._publish_shard()

    def _begin_shard(self) -> None:
        self._buffer.clear()
        self._num_bytes = self._format.empty_bytes
        """Of the shard that is being filled."""

    def _publish_shard(self) -> None:
        name = f"{self._prefix}.{self.num_shards:05}.mds"
        path = self._destination.stage(name)
        size, hashes = self._buffer.write(path, self._format.head(self._buffer.ends))
        raw_data = {"basename": path.name, "bytes": size, "hashes": hashes}
        self.shards.append(
            {
                "samples": len(self._buffer.ends),
                "raw_data": raw_data,
                "zip_data": None,
                **self._format.config,
            }
        )
        self.published.append(self._destination.publish(path, name))
        self._begin_shard()


def num_bytes(shards: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of shards, by what an index says of them."""
    return sum(shard["raw_data"]["bytes"] for shard in shards)


def publish_index(
    destination: Destination, folder: str, shards: Iterable[Mapping[str, Any]]
) -> None:
    """Writes the index that makes a data set of a folder's shards, as MDSWriter writes it.

    Args:
        destination: Where all the shards already are.
        folder: The shards' folder.
        shards: What it says of them, in order; taken one by one.
    """
    path = destination.stage(f"{folder}/{INDEX_FILE}")
    with path.open("w", encoding="utf-8") as file:
        file.write('{"shards": [')
        for place, shard in enumerate(shards):
            file.write((", " if place else "") + json.dumps(shard, sort_keys=True))
        file.write('], "version": 2}')
    destination.publish(path, f"{folder}/{INDEX_FILE}")


def publish_text(destination: Destination, text: str, name: str) -> None:
    """Writes a small file."""
    path = destination.stage(name)
    path.write_text(text, encoding="utf-8")
    destination.publish(path, name)


def publish_data_set(
    destination: Destination,
    writers: Mapping[Side, ShardWriter],
    beside: Mapping[Side, Mapping[str, str]] | None = None,
) -> None:
    """Makes a data set of what was written: the last shards, then what stands beside them, then the
    index files, each once all before it is there.

    Args:
        destination: Where.
        writers: Those of its sides.
        beside: For each side, name and text of files that stand beside its index.
    """
    for side, writer in writers.items():
        writer.finish()
        for name, text in (beside or {}).get(side, {}).items():
            publish_text(destination, text, f"{side}/{name}")
    destination.wait()
    for side, writer in writers.items():
        publish_index(destination, side, writer.shards)
    destination.wait()
