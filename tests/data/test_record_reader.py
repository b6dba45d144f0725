"""Our reader of a shard gives what streaming's gives."""

import json
import shutil

import numpy as np
import pytest
from streaming import MDSWriter
from streaming.base.format import reader_from_json
from streaming.base.format.mds.encodings import get_mds_encodings

from vlm_composer.data.record_reader import RecordReader

RECORDS = {
    "images": (
        {"id": "str", "image": "bytes", "prompt": "str", "answer": "str"},
        lambda i: {"id": f"ü{i}", "image": bytes(range(i)), "prompt": "<image>", "answer": "a" * i},
    ),
    "features": (
        {"id": "str", "patches": "ndarray:float16:3,4", "prompt": "str", "answer": "str"},
        lambda i: {
            "id": str(i),
            "patches": np.full((3, 4), i, np.float16),
            "prompt": "",
            "answer": "b",
        },
    ),
    "others": (
        {"n": "int", "x": "float64", "any": "ndarray", "json": "json", "picture": "str_int"},
        lambda i: {
            "n": i,
            "x": i / 3,
            "any": np.arange(i + 1),
            "json": {"i": [i]},
            "picture": i * 10**20,
        },
    ),
}


def open_both(folder, index=0):
    shards = json.loads((folder / "index.json").read_text())["shards"]
    theirs = reader_from_json(str(folder), None, shards[index])
    return theirs, RecordReader.of(theirs)


@pytest.mark.parametrize("kind", RECORDS)
def test_records_are_those_of_streaming(tmp_path, kind):
    columns, record = RECORDS[kind]
    assert {encoding.split(":")[0] for encoding in columns.values()} <= get_mds_encodings()
    with MDSWriter(out=str(tmp_path), columns=columns, size_limit=700) as writer:
        for index in range(40):
            writer.write(record(index))
    shards = len(list(tmp_path.glob("*.mds")))
    assert shards > 1
    seen = 0
    for shard in range(shards):
        theirs, ours = open_both(tmp_path, shard)
        assert len(theirs) == len(ours)
        assert (theirs.size, theirs.file_pairs) == (ours.size, ours.file_pairs)
        for index in range(len(ours)):
            assert ours.get_sample_data(index) == theirs.get_sample_data(index)
            found, expected = ours[index], theirs[index]
            assert list(found) == list(expected)
            for name in columns:
                np.testing.assert_array_equal(found[name], expected[name])
                assert type(found[name]) is type(expected[name])
            seen += 1
    assert seen == 40


@pytest.fixture
def shard(shards, tmp_path):
    """A shard of our own, its file and a reader of it."""
    folder = shutil.copytree(shards / "train", tmp_path / "copy")
    theirs, ours = open_both(folder)
    assert ours[0] == theirs[0]
    return folder / ours.raw_data.basename, ours


def test_a_shard_that_was_evicted_is_not_found(shard):
    path, reader = shard
    path.unlink()
    with pytest.raises(FileNotFoundError):  # what streaming fetches it again for
        reader[0]


def test_a_shard_that_is_too_short_is_named(shard):
    path, reader = shard
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"{path} ends within sample {len(reader) - 1}, at "):
        reader[len(reader) - 1]
    assert reader[0]["id"]


def test_shards_of_another_kind_are_refused(tmp_path):
    from streaming import JSONWriter

    with JSONWriter(out=str(tmp_path), columns={"a": "str"}) as writer:
        writer.write({"a": "b"})
    (shard,) = json.loads((tmp_path / "index.json").read_text())["shards"]
    with pytest.raises(ValueError, match="its shards are not MDS"):
        RecordReader.of(reader_from_json(str(tmp_path), None, shard))
