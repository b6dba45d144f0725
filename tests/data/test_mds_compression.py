"""Compressed shards come back as they were, and unpack to what their index says, or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash
from streaming import MDSWriter
from streaming.base.compression import compress

from remote_shards import BAD, open_captions, read
from vlm_composer.data.stream import CorruptShardError
from vlm_composer.mds.compression import decompress

ALGORITHMS = ("br", "bz2", "gz", "snappy", "zstd")
COLUMNS = {"id": "str", "image": "bytes", "prompt": "str", "answer": "str"}


def write_compressed(folder, algorithm):
    """40 samples in several shards."""
    with MDSWriter(
        out=str(folder), columns=COLUMNS, compression=algorithm, hashes=["xxh64"], size_limit=2048
    ) as writer:
        for number in range(40):
            text = {"prompt": "<image>", "answer": f"answer {number} " * 9}
            writer.write({"id": str(number), "image": bytes(200), **text})
    return folder


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "zstd:7"])
@pytest.mark.parametrize("validate_hash", ["xxh64", None])
@pytest.mark.parametrize("keep_zip", [False, True])
def test_every_algorithm_of_streaming(tmp_path, algorithm, validate_hash, keep_zip):
    folder = write_compressed(tmp_path / "remote", algorithm)
    assert not list(folder.glob("*.mds"))
    cache = tmp_path / "cache"
    stream = {"validate_hash": validate_hash, "keep_zip": keep_zip}
    captions = open_captions(cache, FolderRemote(folder), **stream)
    samples = read(captions)
    assert {int(name) for name in samples} == set(range(40))
    assert samples["7"]["answer"] == "answer 7 " * 9
    zipped = {path.name for path in folder.glob("*.mds.*")}
    assert {path.name for path in cache.glob("*.mds.*")} == (zipped if keep_zip else set())
    assert len(list(cache.glob("*.mds"))) == len(zipped) > 3
    assert not list(cache.glob(".*"))


class FolderRemote:
    """A folder in place of a bucket."""

    def __init__(self, folder):
        self.url = str(folder)


def replaced(folder, unpacked, algorithm, raw_bytes=None):
    """Have the first shard unpack to something else, all else being right."""
    index = json.loads((folder / "index.json").read_bytes())
    entry = index["shards"][0]
    data = compress(algorithm, unpacked)
    (folder / entry["zip_data"]["basename"]).write_bytes(data)
    hashes = {"xxh64": xxhash.xxh64_hexdigest(data)}
    entry["zip_data"].update(bytes=len(data), hashes=hashes)
    if raw_bytes is not None:
        entry["raw_data"]["bytes"] = raw_bytes
    (folder / "index.json").write_text(json.dumps(index))
    return entry["zip_data"]["basename"]


ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
BOMB = 1 << 28
SPEED = {"br": "br:1", "bz2": "bz2:1", "gz": "gz:1"}
READ = """
import resource, sys
from pathlib import Path
from remote_shards import open_captions, read

class Remote:
    def __init__(self, url):
        self.url = url

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
for folder in sys.argv[1:]:
    captions = open_captions(folder + "-cache", Remote(folder))
    try:
        read(captions)
    except Exception as error:
        print(type(error).__name__, error)
print(peak() - before)
"""


@pytest.mark.slow
def test_shards_that_unpack_to_more_than_their_index_says(tmp_path):
    """256 MiB, where the index says 2 kB."""
    folders = [write_compressed(tmp_path / name, name) for name in ALGORITHMS]
    names = [
        replaced(folder, bytes(BOMB), SPEED.get(folder.name, folder.name)) for folder in folders
    ]
    command = [sys.executable, "-c", READ, *map(str, folders)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=True)
    *errors, kilobytes = done.stdout.splitlines()
    for error, name, folder in zip(errors, names, folders, strict=True):
        assert error.startswith(f"CorruptShardError {name} of {folder} is corrupt: it ")
        assert "the index says" in error
        cache = Path(f"{folder}-cache")
        assert {path.name for path in cache.iterdir()} == {"index.json"}
    assert int(kilobytes) < (BOMB >> 11)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [0, 1, 99, 101, 100_000, 3 << 20])
def test_what_unpacks_to_another_size(tmp_path, algorithm, size):
    source, target = tmp_path / "source", tmp_path / "target"
    data = bytes(range(100)) * (1 + size // 100)
    source.write_bytes(compress(algorithm, data[:size]))
    fault = decompress(source, target, algorithm, 100)
    assert fault
    assert target.stat().st_size <= 100
    assert decompress(source, target, algorithm, size) is None
    assert target.read_bytes() == data[:size]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("damage", [lambda d: d[:-3], lambda d: b"\xff" * 40, lambda d: b""])
def test_what_does_not_unpack(tmp_path, algorithm, damage):
    source = tmp_path / "source"
    source.write_bytes(damage(compress(algorithm, bytes(range(100)))))
    assert decompress(source, tmp_path / "target", algorithm, 100).startswith("it ")


def test_what_unpacks_to_other_bytes_of_that_size(tmp_path):
    folder = write_compressed(tmp_path / "remote", "zstd")
    size = json.loads((folder / "index.json").read_bytes())["shards"][0]["raw_data"]["bytes"]
    replaced(folder, bytes(size), "zstd")
    with pytest.raises(CorruptShardError, match=r"is corrupt: its xxh64 is \w+, the index says"):
        read(open_captions(tmp_path / "cache", FolderRemote(folder)))
    assert not list(Path(tmp_path / "cache").glob("*.mds*"))


@pytest.mark.s3
def test_an_object_that_is_larger_than_its_index_says(remote, tiny_disk):
    """No more of it is written than a shard has: the disk has room for that."""
    remote.put(BAD, bytes(1 << 20))
    captions = open_captions(tiny_disk / "new", remote)
    with pytest.raises(CorruptShardError, match=rf"{BAD} has more than the \d+ bytes that it"):
        read(captions)
    remote.put("index.json", b" " * ((1 << 26) + 1))
    with pytest.raises(CorruptShardError, match=r"index\.json has more than the 67108864 bytes"):
        open_captions(tiny_disk.parent / "other", remote)
