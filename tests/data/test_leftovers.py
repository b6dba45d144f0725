"""What killed runs leave behind is freed; what living ones use is left alone."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from streaming.base.shared.prefix import _pack_locals

from vlm_composer import local_files, locks
from vlm_composer.data import leftovers
from vlm_composer.data.leftovers import (
    SHARED_MEMORY,
    _folders_of,
    claim_caches,
    live_as_parent,
)
from vlm_composer.local_files import partial_path

READER = """
import sys
from streaming import StreamingDataset
from vlm_composer.data.leftovers import claim_caches
from vlm_composer.data.stream import CheckedStream
remote, cache = sys.argv[1:]
claim_caches([cache])
stream = CheckedStream(remote=remote, local=cache, store_timeout=0, validate_hash="xxh64")
dataset = StreamingDataset(streams=[stream], batch_size=4)
print(dataset._shm_prefix_int, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def reader(shards):
    """Starts processes that hold a cache; returns each with the prefix of its shared memory."""
    started = []

    def start(cache: Path) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", READER, str(shards / "train"), str(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process, f"{int(process.stdout.readline()):06}_"

    yield start
    for process in started:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


def blocks(prefix):
    return sorted(path.name for path in SHARED_MEMORY.glob(f"{prefix}*"))


def kill_all(process):
    """The process and its resource tracker, which would tidy up."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


@pytest.mark.slow
def test_only_what_a_dead_run_holds_of_our_folders_is_freed(reader, tmp_path):
    dead, dead_prefix = reader(tmp_path / "ours")
    _, living_prefix = reader(tmp_path / "theirs")
    assert blocks(dead_prefix)
    kill_all(dead)
    assert blocks(dead_prefix), "the kernel keeps them"
    before = blocks(living_prefix)
    again, _ = reader(tmp_path / "ours")  # streaming refuses a folder whose blocks are there
    assert again.poll() is None
    assert blocks(living_prefix) == before
    names = {tuple(_folders_of(b)) for b in SHARED_MEMORY.glob("[0-9]*_locals")}
    assert (str(tmp_path / "ours"),) in names


def test_the_blocks_of_streams_are_freed_by_a_run_over_one_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    caches = [str(tmp_path / name) for name in ("emoji", "llava")]
    (tmp_path / "000007_locals").write_bytes(_pack_locals(caches, 7))
    (tmp_path / "000007_barrier").touch()
    (tmp_path / "000008_locals").write_bytes(_pack_locals([str(tmp_path / "other")], 8))
    claim_caches(caches[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["000008_locals"]


def test_a_cache_that_a_living_run_reads_into_is_refused(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "ORPHAN_SECONDS", 0)
    process, prefix = reader(tmp_path / "cache")
    before = blocks(prefix)
    with pytest.raises(ValueError, match=f"cache is in use by process {process.pid}"):
        claim_caches([str(tmp_path / "cache")])
    assert blocks(prefix) == before


def test_half_written_files_of_dead_processes_are_deleted(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait(timeout=30)
    ours = partial_path(tmp_path / "shard.00000.mds")
    theirs = ours.with_name(ours.name.replace(f"-{os.getpid()}.", f"-{dead.pid}."))
    for path in (ours, theirs):
        path.write_bytes(b"half")
    claim_caches([str(tmp_path)])
    assert ours.exists()
    assert not theirs.exists()


def test_half_written_files_of_other_machines_are_deleted_once_they_are_old(tmp_path, monkeypatch):
    # Another container may have this host's name, and its process 1 lives though ours of that
    # number does not.
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait(timeout=30)
    monkeypatch.setattr(local_files, "_machine", lambda: "anothercontainer")
    monkeypatch.setattr(os, "getpid", lambda: dead.pid)
    living, abandoned = partial_path(tmp_path / "a.mds"), partial_path(tmp_path / "b.mds")
    monkeypatch.undo()
    for path in (living, abandoned):
        path.write_bytes(b"half")
    old = time.time() - local_files.ABANDONED_SECONDS - 60
    os.utime(abandoned, (old, old))
    claim_caches([str(tmp_path)])
    assert living.exists()
    assert not abandoned.exists()


@pytest.mark.parametrize("at", ["boot_id", "namespace"])
def test_a_process_number_means_something_within_one_container_only(monkeypatch, tmp_path, at):
    here = local_files._machine.__wrapped__()
    if at == "boot_id":
        (tmp_path / "boot_id").write_text("another start\n")
        monkeypatch.setattr(local_files, "_BOOT_ID", str(tmp_path / "boot_id"))
    else:
        monkeypatch.setattr(os, "readlink", lambda path: "pid:[4026539999]")
    assert local_files._machine.__wrapped__() != here


ORPHAN = """
import multiprocessing, os, time
from vlm_composer.data.leftovers import die_with_parent
def work(connection):
    die_with_parent()
    connection.send(os.getpid())
    time.sleep(300)
if __name__ == "__main__":
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    process.start()
    print(here.recv(), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_worker_dies_with_its_parent():
    # The worker holds the pipe open too: reading to its end waits for both.
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout) > 0


def tell(connection: Connection) -> None:
    """A worker that says when it is ready, and what it logs from then on; it answers as well."""
    handler = logging.Handler()
    handler.emit = lambda record: connection.send(record.getMessage())
    leftovers.log.addHandler(handler)
    leftovers.log.setLevel(logging.DEBUG)
    live_as_parent()
    connection.send("ready")
    while True:
        connection.send(connection.recv())


def test_a_worker_ends_at_its_parents_sigterm_alone():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    worker = context.Process(target=tell, args=(there,), daemon=True)
    worker.start()
    there.close()
    assert here.recv() == "ready"
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    # The kernel keeps one signal of a kind: ours would be lost if it came before that one is taken.
    assert here.poll(30)
    assert here.recv().startswith("Ignored a SIGTERM")
    here.send("still there?")
    assert here.poll(30)
    assert here.recv() == "still there?"
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
