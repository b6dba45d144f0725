"""Shards in a real S3 bucket: whatever happens to them or to the server, the samples are right."""

import os
import shutil
import signal
import socket
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from convert import convert_llava
from tiny import byte_tokenizer, write_pairs
from vlm_composer.data.dataset import CaptionsByIndex, SampleEncoder, StreamingCaptions
from vlm_composer.data.leftovers import die_with_parent
from vlm_composer.data.stream import CheckedStream, CorruptShardError
from vlm_composer.data.template import Template
from vlm_composer.storage import S3Store, StoreError

SAMPLES = 80
DEADLINE = 60
BAD = "shard.00003.mds"
workers_or_none = pytest.mark.parametrize("workers", [0, 2])


def write_shards(folder, count):
    json_path, images = write_pairs(folder, count)
    convert_llava(
        json_path, images, folder / "mds", eval_ratio=0, size_limit=2048, show_progress=False
    )
    return folder / "mds" / "train"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven shards and their index."""
    return write_shards(tmp_path_factory.mktemp("stream"), SAMPLES)


class Remote:
    """A prefix of a bucket of a real server."""

    def __init__(self, server, folder):
        self.server = server
        self.bucket = f"stream-{uuid.uuid4().hex}"
        self.url = server.make_bucket(self.bucket) + "/some/train"
        for path in folder.iterdir():
            self.put(path.name, path.read_bytes())

    def put(self, name, data):
        self.server.client().put_object(
            Bucket=self.bucket, Key=f"some/train/{name}", Body=bytes(data)
        )


@pytest.fixture
def remote(s3_server, folder):
    yield Remote(s3_server, folder)
    s3_server.start()


@pytest.fixture
def cache(tmp_path, folder):
    """A cache that an earlier run filled."""
    return shutil.copytree(folder, tmp_path / "cache")


def open_captions(local, remote=None, *, store_timeout=60, streaming=None, **stream):
    encoder = SampleEncoder(
        Template(byte_tokenizer(), num_image_tokens=4, max_seq_len=64), image_size=16
    )
    stream = CheckedStream(
        local=str(local),
        remote=remote and remote.url,
        store_timeout=store_timeout,
        **{"validate_hash": "xxh64", **stream},
    )
    return StreamingCaptions(encoder, stream, batch_size=4, **streaming or {})


def read(captions, workers=0):
    """All samples of an epoch, by id, none twice."""
    options = {"timeout": DEADLINE, "worker_init_fn": die_with_parent} if workers else {}
    loader = DataLoader(captions, 4, num_workers=workers, collate_fn=list, **options)
    batches = iter(loader)
    try:
        samples = [sample for batch in batches for sample in batch]
    finally:
        if workers:
            batches._shutdown_workers()  # a garbage collector that does it takes 5 s a worker
    by_id = {sample["id"]: sample for sample in samples}
    assert len(by_id) == len(samples)
    return by_id


@pytest.fixture
def gets(monkeypatch, tmp_path):
    """Names of the objects that were asked for, by this process and its loaders' workers.

    `before` and `failed` are called with the name around each download.
    """

    class Gets:
        path = tmp_path / "gets"
        before = failed = staticmethod(lambda name: None)

        def __call__(self):
            return self.path.read_text().split()

    gets, get = Gets(), S3Store.get
    gets.path.touch()

    def counted(self, name, path):
        with gets.path.open("a") as log:
            log.write(f"{name}\n")
        gets.before(name)
        try:
            get(self, name, path)
        except Exception:
            gets.failed(name)
            raise

    monkeypatch.setattr(S3Store, "get", counted)
    return gets


def flipped(data):
    """The same, but for one bit."""
    data = bytearray(data)
    data[len(data) // 2] ^= 1
    return data


def cut(data):
    return data[:-1]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, sample in expected.items():
        for key in ("pixel_values", "input_ids", "labels"):
            assert torch.equal(found[name][key], sample[key]), (name, key)


@pytest.fixture
def expected(folder):
    """The samples, read where they were written."""
    samples = read(open_captions(folder, streaming={"shuffle": False}))
    assert len(samples) == SAMPLES
    return samples


@pytest.mark.s3
class TestRemote:
    @workers_or_none
    def test_samples_are_those_of_the_folder(
        self, remote, folder, tmp_path, expected, gets, workers
    ):
        assert_same(read(open_captions(tmp_path / "new", remote), workers), expected)
        assert sorted(gets()) == sorted(path.name for path in folder.iterdir())
        assert not list((tmp_path / "new").glob(".*"))

    @workers_or_none
    @pytest.mark.parametrize("damage", [flipped, cut])
    @pytest.mark.parametrize("early", [False, True])
    def test_a_damaged_shard_of_the_cache_is_fetched_again(
        self, remote, cache, expected, gets, damage, workers, early
    ):
        (cache / BAD).write_bytes(damage((cache / BAD).read_bytes()))
        captions = open_captions(cache, remote, check_at_start=early)
        assert gets() == ["index.json", BAD] if early else ["index.json"]
        assert_same(read(captions, workers), expected)
        assert gets() == ["index.json", BAD]

    @workers_or_none
    @pytest.mark.parametrize("damage", [flipped, cut])
    def test_a_damaged_shard_of_the_bucket_ends_the_epoch(
        self, remote, folder, tmp_path, gets, damage, workers
    ):
        remote.put(BAD, damage((folder / BAD).read_bytes()))
        captions = open_captions(tmp_path / "new", remote)
        match = rf"{BAD} of {remote.url} is corrupt: its? .* it was downloaded twice"
        with pytest.raises(CorruptShardError, match=match):
            read(captions, workers)
        assert gets().count(BAD) >= 2 if workers else gets().count(BAD) == 2
        assert not list((tmp_path / "new").glob(f"*{BAD}*"))
        with pytest.raises((CorruptShardError, RuntimeError)):  # nor does it go on after that
            read(captions, workers)

    def test_sizes_alone_are_checked_where_no_hash_is_asked_for(self, remote, folder, tmp_path):
        remote.put(BAD, cut((folder / BAD).read_bytes()))
        captions = open_captions(tmp_path / "new", remote, validate_hash=None)
        with pytest.raises(CorruptShardError, match=r"it has \d+ bytes, the index says \d+"):
            read(captions)

    def test_a_hash_that_the_index_lacks(self, remote, tmp_path):
        captions = open_captions(tmp_path / "new", remote, validate_hash="md5")
        with pytest.raises(
            ValueError, match=r"validate_hash: md5, but .* has sha1, xxh64; set one"
        ):
            read(captions)

    @pytest.mark.parametrize("index", [b'{"version": 2, "sha', b"\xff\xfe", b"[]", b'{"a": 1}'])
    def test_a_damaged_index_of_the_bucket(self, remote, cache, gets, index):
        remote.put("index.json", index)
        with pytest.raises(CorruptShardError, match=f"the index of {remote.url} is corrupt: it "):
            open_captions(cache, remote)
        assert gets() == ["index.json"] * 2

    @pytest.mark.parametrize("early", [False, True])
    def test_an_index_that_changed_since_the_cache_was_filled(
        self, remote, cache, tmp_path, expected, early
    ):
        newer = write_shards(tmp_path / "newer", SAMPLES // 2)
        for path in newer.iterdir():
            remote.put(path.name, path.read_bytes())
        (cache / "index.json").write_bytes(b"torn")
        samples = read(open_captions(cache, remote, check_at_start=early))
        assert_same(samples, read(open_captions(newer)))
        assert len(samples) == SAMPLES // 2

    def test_a_place_that_is_not_there(self, remote, tmp_path):
        for url in ("s3://no-such-bucket/train", f"s3://{remote.bucket}/elsewhere"):
            remote.url, started = url, time.monotonic()
            with pytest.raises(StoreError, match=f"download {url}/index.json: there is no such"):
                open_captions(tmp_path / "new", remote)
            assert time.monotonic() - started < 10

    def test_a_cache_limit_counts_what_was_there(self, remote, cache, expected, gets):
        index, largest = 4096, 2048
        limit = index + 4 * largest
        for number in range(4):
            (cache / f"shard.{number:05}.mds").unlink()  # the second half stays, read last
        used = []
        gets.before = lambda name: used.append(
            sum(path.stat().st_size for path in cache.glob("[!.]*"))
        )
        captions = open_captions(
            cache,
            remote,
            check_at_start=True,
            streaming={"cache_limit": limit, "predownload": 4, "shuffle": False},
        )
        assert_same(read(captions), expected)
        assert len(used) > 4
        assert max(used[1:]) <= limit


@pytest.mark.s3
class TestOutage:
    """The server is killed as the fourth shard is asked for, with little fetched ahead."""

    @pytest.fixture(autouse=True)
    def kill_in_the_middle(self, remote, gets, tmp_path):
        server, self.mark = remote.server, tmp_path / "failed"
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))

        def kill(name):
            if name != BAD or gets().count(BAD) > 1:
                return
            os.kill(server._process.pid, signal.SIGKILL)
            while True:
                try:
                    socket.create_connection(address, timeout=1).close()
                except OSError:
                    break

        gets.before, gets.failed = kill, lambda name: self.mark.touch()

    def revive(self, server):
        """Start the server once a download has failed."""
        deadline = time.monotonic() + DEADLINE
        while not self.mark.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        server.start()

    @workers_or_none
    def test_a_server_that_comes_back(self, remote, tmp_path, expected, gets, workers):
        captions = open_captions(tmp_path / "new", remote, streaming={"predownload": 4})
        revival = threading.Thread(target=self.revive, args=[remote.server])
        revival.start()
        assert_same(read(captions, workers), expected)
        revival.join()
        assert self.mark.exists()

    @workers_or_none
    def test_a_server_that_stays_away(self, remote, tmp_path, gets, workers):
        captions = open_captions(
            tmp_path / "new", remote, store_timeout=2, streaming={"predownload": 4}
        )
        with pytest.raises(StoreError, match=rf"{remote.url}/shard\S*: the store was away for 2 s"):
            read(captions, workers)
        failed_for = time.time() - self.mark.stat().st_mtime
        assert failed_for < 20
        assert gets().count(BAD) > 2


@workers_or_none
@pytest.mark.parametrize("damage", [flipped, cut])
def test_a_damaged_shard_of_a_folder(cache, damage, workers):
    (cache / BAD).write_bytes(damage((cache / BAD).read_bytes()))
    captions = open_captions(cache)
    with pytest.raises(
        CorruptShardError, match=f"{cache / BAD} is corrupt: .*convert the data set"
    ):
        read(captions, workers)
    by_index = CaptionsByIndex(open_captions(cache))
    with pytest.raises(CorruptShardError, match=f"{cache / BAD} is corrupt"):
        [by_index[index] for index in range(SAMPLES)]


@workers_or_none
def test_a_missing_shard_of_a_folder(cache, workers):
    (cache / BAD).unlink()
    with pytest.raises(StoreError, match=f"{cache / BAD} is missing, and there is no remote"):
        read(open_captions(cache), workers)


def test_a_disk_without_room(remote, tmp_path, monkeypatch):
    captions = open_captions(tmp_path / "new", remote)
    captions.check_disk()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(StoreError, match=r"new: the cache needs 0\.0 GB more and the disk has"):
        captions.check_disk()
    assert len(read(captions)) == SAMPLES
    captions.check_disk()  # they are there now


def test_a_disk_that_fills_up(remote, tiny_disk):
    (tiny_disk / "ballast").write_bytes(bytes(48 << 10))
    captions = open_captions(tiny_disk / "new", remote)
    with pytest.raises(StoreError, match="the local disk is full; free some space"):
        read(captions)
    assert not list(Path(tiny_disk).glob("new/.*"))
