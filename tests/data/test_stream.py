"""Shards in a real S3 bucket or a folder: they are right, or the epoch ends with an error."""

import time

import pytest

from remote_shards import BAD, SAMPLES, assert_same, open_captions, read, write_shards
from vlm_composer.data.by_index import CaptionsByIndex
from vlm_composer.data.stream import CorruptShardError
from vlm_composer.outages import StoreError

workers_or_none = pytest.mark.parametrize("workers", [0, 2])


def flipped(data):
    """The same, but for one bit."""
    data = bytearray(data)
    data[len(data) // 2] ^= 1
    return data


def cut(data):
    return data[:-1]


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
        assert gets() == (["index.json", BAD] if early else ["index.json"])
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
        with pytest.raises(ValueError, match=r"validate_hash: md5, but .* has xxh64; set one"):
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
            (cache / f"shard.00000.{number:05}.mds").unlink()  # the second half stays, read last
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
