"""Our reader of a shard gives what streaming's gives, of the encodings that are read."""

import json
import shutil
import struct

import numpy as np
import pytest
from streaming import MDSWriter
from streaming.base.format import reader_from_json
from streaming.base.format.mds.encodings import get_mds_encodings

from vlm_composer.mds.encodings import SampleDecoder, array_encoding, fixed_bytes
from vlm_composer.mds.index import read_index
from vlm_composer.mds.reader import read_folder, readers

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
    "arrays": (
        {"x": "ndarray:uint16:1,1", "y": "ndarray:float32:2,1"},
        lambda i: {"x": np.uint16([[i]]), "y": np.float32([[i / 3], [i]])},
    ),
}


def open_both(folder, index=0):
    shards = json.loads((folder / "index.json").read_text())["shards"]
    theirs = reader_from_json(str(folder), None, shards[index])
    return theirs, readers(read_index(folder / "index.json"), str(folder))[index]


@pytest.mark.parametrize("kind", RECORDS)
def test_records_are_those_of_streaming(tmp_path, kind):
    columns, record = RECORDS[kind]
    with MDSWriter(out=str(tmp_path), columns=columns, size_limit=700) as writer:
        for index in range(40):
            writer.write(record(index))
    shards = len(list(tmp_path.glob("*.mds")))
    assert shards > 1 or kind == "arrays"
    seen = []
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
            seen.append(found)
    assert len(seen) == 40
    for found, expected in zip(read_folder(tmp_path), seen, strict=True):
        np.testing.assert_equal(found, expected)


def test_the_encodings_that_are_read():
    assert array_encoding("float16", (729, 1152)) == "ndarray:float16:729,1152"
    assert fixed_bytes("ndarray:float16:729,1152") == 2 * 729 * 1152
    assert fixed_bytes("str") is None
    refused = get_mds_encodings() - {"str", "bytes"}
    assert "pkl" in refused
    refused |= {
        *("", "STR", "str ", "str:", "bytes:1", "pkl:", "ndarray:", "ndarray:float16"),
        *("ndarray:float16:3", "ndarray:float16:3,4,5", "ndarray:float16:0,4"),
        *("ndarray:float16:3,-4", "ndarray:float16:3,4 ", "ndarray:float16:03,4"),
        *("ndarray:float16:3_0,4", "ndarray:float16:٣,4", "ndarray:float16:3,4\n"),
        *("ndarray:float64:3,4", "ndarray:object:3,4", "ndarray:float16:9999999999,1"),
    }
    for encoding in refused:
        with pytest.raises(ValueError, match=r"the encoding .* is not read, only str, bytes and"):
            SampleDecoder({"column": encoding})


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
    path.write_bytes(b"")
    with pytest.raises(OSError, match=f"{path} places sample 0 at bytes 0 to 0 of "):
        reader[0]


@pytest.mark.parametrize("place", [(0, 4), (9, 9), (9, 8), (4, 0xFFFFFFFF)])
def test_a_sample_outside_its_shard(shard, place):
    path, reader = shard
    data = bytearray(path.read_bytes())
    data[4:12] = struct.pack("<2I", *place)
    path.write_bytes(data)
    with pytest.raises(OSError, match=f"places sample 0 at bytes {place[0]} to {place[1]} of "):
        reader[0]


def test_a_sample_whose_fields_are_longer_than_it_is(shard):
    path, reader = shard
    data = bytearray(path.read_bytes())
    begin = struct.unpack("<I", data[4:8])[0]
    data[begin : begin + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(OSError, match=rf"{path} holds a sample that .* its fields take \d+;"):
        reader[0]
