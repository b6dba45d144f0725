"""Writes what a conversion leaves behind: the shards of a side, and the list of rejects."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.destination import Destination
from convert.errors import Reason, Rejected
from convert.split import Side
from vlm_composer.data.schema import MDS_COLUMNS

HASHES = ["sha1", "xxh64"]
"""Of every shard: one that every reader has, and a fast one."""


class ShardWriter:
    """Writes one side of the split as MDS shards, and publishes each as soon as it is full.

    MDSWriter only ever sees a local folder here, for the reasons given at `Bucket`. Nor is it used
    as a context manager: in streaming 0.13 that writes index.json even on the way out of an
    exception, and half a data set then looks like a whole one.

    Args:
        destination: Where the side's folder is.
        side: "train" or "eval".
        size_limit: Bytes of a shard.
        columns: Column name → MDS encoding.
    """

    def __init__(
        self,
        destination: Destination,
        side: Side,
        size_limit: int,
        columns: Mapping[str, str] = MDS_COLUMNS,
    ) -> None:
        from streaming import MDSWriter  # takes seconds: it imports torch

        self._destination = destination
        self._side = side
        self._size_limit = size_limit
        self._mds = MDSWriter(
            columns=dict(columns),
            out=str(destination.folder / side),
            hashes=HASHES,
            size_limit=size_limit,
        )
        self.num_samples = 0
        self.num_shards = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards written so far."""
        return sum(shard["raw_data"]["bytes"] for shard in self._mds.shards)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a sample.

        Args:
            record: A value for every column.

        Raises:
            Rejected: If it is larger than a shard. MDSWriter would write an empty shard before it.
        """
        sample: dict[str, Any] = {**record}
        size = len(self._mds.encode_sample(sample)) + self._mds.extra_bytes_per_sample
        if size + self._mds.extra_bytes_per_shard > self._size_limit:
            raise Rejected(
                Reason.TOO_LARGE, f"{size} bytes, more than a shard holds ({self._size_limit})"
            )
        self._mds.write(sample)
        self.num_samples += 1
        self._publish_new_shards()

    def finish(self) -> None:
        """Publishes the last shard. The index file is written, but not published yet."""
        self._mds.finish()
        self._publish_new_shards()

    def publish_index(self) -> None:
        """Publishes the index file, which makes this side a data set."""
        self._destination.publish(f"{self._side}/index.json")

    def _publish_new_shards(self) -> None:
        for shard in self._mds.shards[self.num_shards :]:
            self._destination.publish(f"{self._side}/{shard['raw_data']['basename']}")
            self.num_shards += 1


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
            (destination.folder / side / name).write_text(text, encoding="utf-8")
            destination.publish(f"{side}/{name}")
    destination.wait()
    for writer in writers.values():
        writer.publish_index()
    destination.wait()


class RejectLog:
    """Writes rejects.jsonl, one object a line: index, id, image, reason, detail.

    Args:
        path: The file, replaced where it exists.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="ascii")
        self.by_reason: Counter[str] = Counter()

    def add(self, index: int, item: object, rejected: Rejected) -> None:
        """Notes one item.

        Args:
            index: Its place in the source, from 0.
            item: The item, as the source gave it.
            rejected: What is wrong with it.
        """
        fields = item if isinstance(item, dict) else {}
        line = {
            "index": index,
            "id": _text_or_number(fields.get("id")),
            "image": _text_or_number(fields.get("image")),
            "reason": rejected.reason,
            "detail": rejected.detail[:500],
        }
        self._file.write(json.dumps(line) + "\n")
        self.by_reason[rejected.reason.value] += 1

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()


def _text_or_number(value: object) -> str | int | None:
    return value if isinstance(value, str | int) else None
