"""Locks and the folders that they protect, against other processes, other users and links."""

import fcntl
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from convert.staging import Scratch
from vlm_composer import locks
from vlm_composer.data.leftovers import claim_caches, look_at_caches
from vlm_composer.locks import Lock, check_free, hold, user_folder
from vlm_composer.training.ownership import LOCK_FILE, check_ownership, take_ownership

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes the part of another user")


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A TMPDIR that other users can write to as well."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


HOLDER = """
import sys
from pathlib import Path
from vlm_composer.locks import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Starts processes that hold a lock each until the test ends."""
    started = []

    def start(path: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


def as_nobody(action):
    """What `action` returns or raises, as text, in a child process of another user."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            said = repr(action())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_a_link_in_place_of_a_lock_is_refused_and_its_target_kept(tmp_path, victim):
    path = tmp_path / "lock"
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        Lock(path)
    with pytest.raises(OSError, match="symbolic link"):
        check_free(path, "it", "")
    assert victim.read_text() == "precious"


def test_a_link_to_nothing_makes_no_file(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="symbolic link"):
        Lock(tmp_path / "lock")
    assert not (tmp_path / "made").exists()


def test_a_conversion_leaves_planted_folders_and_links_alone(temporary, tmp_path, victim):
    planted = temporary / "vlm-composer-convert-planted"
    planted.mkdir()
    (planted / "lock").symlink_to(victim)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (temporary / "vlm-composer-convert-link").symlink_to(elsewhere)
    Scratch().close()
    assert victim.read_text() == "precious"
    assert list(elsewhere.iterdir()) == []


@needs_root
def test_a_conversion_leaves_other_users_folders_alone(temporary):
    theirs = temporary / "vlm-composer-convert-theirs"
    theirs.mkdir()
    (theirs / "data").write_text("theirs")
    os.chown(theirs, NOBODY, NOBODY)
    Scratch().close()
    assert [path.name for path in theirs.iterdir()] == ["data"]


def test_the_users_folder_is_nobody_elses(temporary):
    folder = user_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert user_folder().stat().st_mode & 0o777 == 0o700


def test_a_link_in_place_of_the_users_folder_is_refused(temporary, tmp_path):
    (temporary / f"vlm_composer-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="or a link; remove it, or set TMPDIR"):
        user_folder()


@needs_root
def test_a_folder_that_another_user_made_is_refused(temporary):
    folder = temporary / f"vlm_composer-{os.getuid()}"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(PermissionError, match=f"but of user {NOBODY}"):
        user_folder()


@needs_root
@pytest.mark.parametrize("look", [claim_caches, look_at_caches])
def test_a_second_user_of_a_cache_reads_what_to_do(temporary, tmp_path, look):
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o755)
    claim_caches([str(cache)])
    said = as_nobody(lambda: look([str(cache)]))
    assert said.startswith(f"ValueError: {cache} cannot be written by user {NOBODY}, it belongs to")
    assert "give this run a cache of its own" in said


def test_a_held_lock_names_its_process_and_is_free_once_that_is_dead(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "ORPHAN_SECONDS", 0)
    process = holder(tmp_path / "lock")
    for ask in (hold, check_free):
        with pytest.raises(ValueError, match=f"it is in use by process {process.pid} on .*; wait"):
            ask(tmp_path / "lock", "it", "wait")
    process.kill()
    process.wait(timeout=30)
    assert check_free(tmp_path / "lock", "it", "wait")
    assert hold(tmp_path / "lock", "it", "wait")
    assert not hold(tmp_path / "lock", "it", "wait"), "it is this process's already"


PARENT = HOLDER.replace("sys.stdin.read()", "").replace(
    'print("held", flush=True)',
    """
import os
if os.fork() == 0:
    print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), 9)
""",
)


def test_a_lock_outlives_a_killed_rank_while_its_forked_workers_live(tmp_path):
    path = tmp_path / "lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(path)], text=True, **pipes)
    assert parent.stdout.readline() == "held\n"
    assert parent.wait(timeout=30) == -9
    with pytest.raises(BlockingIOError, match=f"held by process {parent.pid} on"):
        Lock(path)
    parent.stdin.close()  # which ends the child
    parent.stdout.read()
    Lock(path, 30).release()


def test_two_that_look_do_not_see_each_other(tmp_path):
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert check_free(tmp_path / "lock", "it", "")


def test_locks_are_taken_in_one_place():
    """Another way to lock would not follow this one's rules for links, users and killed runs."""
    root = Path(locks.__file__).parent.parent
    sources = [*root.glob("vlm_composer/**/*.py"), *root.glob("convert/**/*.py")]
    locking = re.compile(r"import (fcntl|filelock|portalocker)|from filelock|lockf")
    found = [path for path in sources if locking.search(path.read_text())]
    assert len(sources) > 100
    assert found == [Path(locks.__file__)]


def test_the_locks_text_is_not_trusted(tmp_path, holder):
    process = holder(tmp_path / "lock")
    (tmp_path / "lock").write_text("process 1 on \x1b[31mevil\n0 errors")
    with pytest.raises(ValueError, match="it is in use by another process; wait"):
        check_free(tmp_path / "lock", "it", "wait")
    assert process.poll() is None


@pytest.mark.parametrize("which", ["run_folder", "save_folder"])
def test_two_runs_do_not_share_a_folder(tiny_config, tmp_path, holder, monkeypatch, which):
    monkeypatch.setattr(locks, "ORPHAN_SECONDS", 0)
    shared = tmp_path / "shared"
    shared.mkdir()
    process = holder(shared / LOCK_FILE)
    others = {"run_folder": str(tmp_path / "run"), "save_folder": str(tmp_path / "save")}
    config = tiny_config(**others | {which: str(shared)})
    for ask in (check_ownership, take_ownership):
        with pytest.raises(ValueError, match=f"{shared} is in use by process {process.pid} on"):
            ask(config)
    take_ownership(tiny_config(**others, save_overwrite=True))
