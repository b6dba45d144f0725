"""Parquet files as Hugging Face's datasets are."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


def write(path: Path, rows: dict[str, Any], **options: Any) -> Path:
    """A Parquet file of these columns."""
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(rows), path, **options)
    return path


def table_of(pairs: Any, items: list[Any] | None = None) -> dict[str, Any]:
    """The items' columns, with Hugging Face's struct of an image."""
    items = pairs.items if items is None else items
    images = [
        {"bytes": (pairs.images / item["image"]).read_bytes(), "path": item["image"]}
        for item in items
    ]
    return {
        "id": [item["id"] for item in items],
        "image": pa.array(images, IMAGE),
        "conversations": pa.array([item["conversations"] for item in items], TURNS),
    }
