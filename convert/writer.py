"""Writes the shards of a side, and the index that makes a data set of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from convert.destination import Destination
from convert.errors import Reason, Rejected
from convert.split import Side
from vlm_composer.data.schema import MDS_COLUMNS

HASHES = ["sha1", "xxh64"]
"""Of every shard: one that every reader has, and a fast one."""


_OVERHEAD = 1 << 12
"""Bytes of a shard beside the values of its only sample: more than its header and sizes."""


class ShardWriter:
    """Writes MDS shards in a staging folder, and publishes each as soon as it is full.

    MDSWriter only ever sees a local folder here, for the reasons given at `Bucket`. Its index.json
    is not used: several writers may share a folder. Nor is it used as a context manager: in
    streaming 0.13 that goes on as after success even on the way out of an exception.

    Args:
        destination: Where the folder is.
        folder: "train" or "eval", or a folder that holds one.
        size_limit: Bytes of a shard.
        columns: Column name → MDS encoding.
        partition: Part of the shards' names, where several writers share a folder.
    """

    def __init__(
        self,
        destination: Destination,
        folder: str,
        size_limit: int,
        columns: Mapping[str, str] = MDS_COLUMNS,
        partition: int | None = None,
    ) -> None:
        from streaming import MDSWriter  # takes seconds: it imports torch

        self._destination = destination
        self._folder = folder
        self._size_limit = size_limit
        self._names = "shard" if partition is None else f"shard.{partition:05}"
        self._staged = destination.stage(f"{folder}/{self._names}")
        shutil.rmtree(self._staged, ignore_errors=True)  # of a task that failed
        self._mds = MDSWriter(
            columns=dict(columns),
            out=str(self._staged),
            hashes=HASHES,
            size_limit=size_limit,
        )
        self.shards: list[dict[str, Any]] = []
        """What an index says of the shards that were published."""
        self.num_samples = 0

    @property
    def num_shards(self) -> int:
        """Shards published so far."""
        return len(self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards published so far."""
        return num_bytes(self.shards)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a sample.

        Args:
            record: A value for every column.

        Raises:
            Rejected: If it is larger than a shard. MDSWriter would write an empty shard before it.
        """
        sample: dict[str, Any] = {**record}
        most = _most_bytes(sample)
        if most is None or most + _OVERHEAD > self._size_limit:  # MDSWriter encodes it once more
            size = len(self._mds.encode_sample(sample)) + self._mds.extra_bytes_per_sample
            if size + self._mds.extra_bytes_per_shard > self._size_limit:
                raise Rejected(
                    Reason.TOO_LARGE, f"{size} bytes, more than a shard holds ({self._size_limit})"
                )
        self._mds.write(sample)
        self.num_samples += 1
        self._publish_new_shards()

    def finish(self) -> None:
        """Publishes the last shard."""
        self._mds.finish()
        self._publish_new_shards()

    def close(self) -> None:
        """Deletes what is left in staging. To be called once its shards are published."""
        shutil.rmtree(self._staged)

    def _publish_new_shards(self) -> None:
        for shard in self._mds.shards[self.num_shards :]:
            staged = self._staged / shard["raw_data"]["basename"]
            name = f"{self._names}.{self.num_shards:05}.mds"
            self.shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
            self._destination.publish(staged, f"{self._folder}/{name}")


def _most_bytes(sample: Mapping[str, Any]) -> int | None:
    """What the values of a sample take at most; None where that is not known without encoding."""
    most = 0
    for value in sample.values():
        if isinstance(value, str):
            most += 4 * len(value)
        elif isinstance(value, bytes):
            most += len(value)
        else:
            return None
    return most


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
    path = destination.stage(f"{folder}/index.json")
    with path.open("w", encoding="utf-8") as file:
        file.write('{"shards": [')
        for place, shard in enumerate(shards):
            file.write((", " if place else "") + json.dumps(shard, sort_keys=True))
        file.write('], "version": 2}')
    destination.publish(path, f"{folder}/index.json")


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
        writer.close()
        publish_index(destination, side, writer.shards)
    destination.wait()
