"""The server goes away while an epoch is read, or the disk has no room."""

import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from remote_shards import BAD, DEADLINE, SAMPLES, assert_same, open_captions, read
from vlm_composer.outages import StoreError

workers_or_none = pytest.mark.parametrize("workers", [0, 2])


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
        with ThreadPoolExecutor(1) as pool:
            revival = pool.submit(self.revive, remote.server)
            assert_same(read(captions, workers), expected)
            revival.result()
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


@pytest.mark.s3
def test_a_disk_without_room(remote, tmp_path, monkeypatch):
    captions = open_captions(tmp_path / "new", remote)
    captions.check_disk()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(StoreError, match=r"new: the cache needs 0\.0 GB more and the disk has"):
        captions.check_disk()
    assert len(read(captions)) == SAMPLES
    captions.check_disk()  # they are there now


@pytest.mark.s3
def test_a_disk_that_fills_up(remote, tiny_disk):
    (tiny_disk / "ballast").write_bytes(bytes(48 << 10))
    captions = open_captions(tiny_disk / "new", remote)
    with pytest.raises(StoreError, match="the local disk is full; free some space"):
        read(captions)
    assert not list(Path(tiny_disk).glob("new/.*"))
