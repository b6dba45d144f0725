"""Our shards against those that streaming's MDSWriter writes of the same samples, byte for byte."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset

from convert.destination import open_destination
from convert.errors import Reason, Rejected
from convert.mds import HASHES, ShardBuffer
from convert.writer import ShardWriter, publish_data_set
from vlm_composer.data.schema import MDS_COLUMNS

Samples = list[dict[str, Any]]


def records(count: int, most: int = 300) -> Samples:
    """Samples of `MDS_COLUMNS` of many sizes, empty values and long characters among them."""
    draw = random.Random(count)
    letters = "abc äß漢🙂\n"

    def text() -> str:
        return "".join(draw.choices(letters, k=draw.randrange(most // 4)))

    return [
        {
            "id": text(),
            "image": draw.randbytes(draw.choice([0, 1, draw.randrange(most)])),
            "prompt": text(),
            "answer": text(),
        }
        for _ in range(count)
    ]


def theirs(folder: Path, samples: Samples, columns: dict[str, str], size_limit: int) -> Path:
    """What MDSWriter writes."""
    with MDSWriter(
        columns=dict(columns), out=str(folder), hashes=HASHES, size_limit=size_limit
    ) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def ours(
    folder: Path,
    samples: Samples,
    columns: dict[str, str],
    size_limit: int,
    buffer: ShardBuffer | None = None,
) -> Path:
    """What we write."""
    with open_destination(folder) as destination:
        writer = ShardWriter(destination, "train", size_limit, columns, buffer=buffer)
        for sample in samples:
            writer.write(sample)
        publish_data_set(destination, {"train": writer})
    return folder / "train"


def assert_same(ours: Path, theirs: Path) -> int:
    """Compare two folders; returns how many shards they have."""
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    return len(names) - 1


def empty_bytes(columns: dict[str, str]) -> int:
    """Bytes of a shard of no samples, with a limit of four digits, by MDSWriter."""
    with tempfile.TemporaryDirectory() as folder:
        writer = MDSWriter(columns=dict(columns), out=folder, hashes=HASHES, size_limit=1000)
        return writer.extra_bytes_per_shard


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., int]:
    """Writes samples both ways, compares all files, and returns how many shards there are."""

    def run(samples: Samples, columns: dict[str, str], size_limit: int, **options: Any) -> int:
        both = [write(tmp_path / write.__name__, samples, columns, size_limit, **more)
                for write, more in ((ours, options), (theirs, {}))]  # fmt: skip
        return assert_same(*both)

    return run


@pytest.mark.parametrize("count", [1, 2, 500])
@pytest.mark.parametrize("size_limit", [1 << 12, 1 << 26])
def test_records(check: Callable[..., int], count: int, size_limit: int) -> None:
    shards = check(records(count), MDS_COLUMNS, size_limit)
    assert (shards > 5) == (count == 500 and size_limit == 1 << 12)


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_shard_is_full_at_the_same_byte(check: Callable[..., int], spare: int) -> None:
    samples: Samples = [{"id": "1", "image": bytes(1000)}] * 3
    columns = {"id": "str", "image": "bytes"}
    two = 2 * (4 + 8 + 1001) + empty_bytes(columns)
    assert check(samples, columns, two + spare) == (3 if spare < 0 else 2)


def test_every_encoding_that_features_use(check: Callable[..., int]) -> None:
    draw = np.random.default_rng(3)
    samples = [
        {
            "id": str(number),
            "patches": draw.integers(0, 1 << 16, (3, 5), np.uint16),
            "free": draw.random((number + 1, 2), np.float32),
            "count": number,
            "json": {"number": number},
        }
        for number in range(40)
    ]
    columns = {
        "id": "str",
        "patches": "ndarray:uint16:3,5",
        "free": "ndarray",
        "count": "int",
        "json": "json",
    }
    assert check(samples, columns, 1 << 12) > 2


def test_a_buffer_that_was_used_before(check: Callable[..., int], tmp_path: Path) -> None:
    buffer = ShardBuffer()
    ours(tmp_path / "before", records(300), MDS_COLUMNS, 1 << 14, buffer)
    buffer.add(b"what a writer left that failed")
    check(records(7), MDS_COLUMNS, 1 << 12, buffer=buffer)


def test_the_largest_sample_that_a_shard_holds(tmp_path: Path) -> None:
    columns = {"image": "bytes"}
    largest = 1000 - empty_bytes(columns) - 4 - 4
    with open_destination(tmp_path) as destination:
        writer = ShardWriter(destination, "train", 1000, columns)
        writer.write({"image": bytes(largest)})
        with pytest.raises(Rejected) as rejected:
            writer.write({"image": bytes(largest + 1)})
        assert rejected.value.reason == Reason.TOO_LARGE
        publish_data_set(destination, {"train": writer})
    assert (tmp_path / "train" / "shard.00000.mds").stat().st_size == 1000
    assert len(StreamingDataset(local=str(tmp_path / "train"), batch_size=1)) == 1


def test_a_value_of_another_length_is_refused(tmp_path: Path) -> None:
    with open_destination(tmp_path) as destination:
        writer = ShardWriter(destination, "train", 1000, {"patches": "ndarray:uint8:3"})
        with pytest.raises(ValueError, match="patches takes 4 bytes, and its encoding 3"):
            writer.write({"patches": b"four"})
