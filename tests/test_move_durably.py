"""Whoever reads a file while it is replaced sees the old one or the new one, whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_composer.local_files import move_durably

WRITE = {
    "move_durably": "Path('new').write_bytes(data); move_durably(Path('new'), Path('name'))",
    "put": "Path('new').write_bytes(data); open_store('.').put('new', 'name')",
}


@pytest.mark.parametrize("how", WRITE)
def test_a_reader_sees_one_file_or_the_other_whole(how, tmp_path):
    (tmp_path / "name").write_bytes(b"0" * 3_000_000)
    script = (
        "import itertools; from pathlib import Path\n"
        "from vlm_composer.local_files import move_durably\n"
        "from vlm_composer.storage import open_store\n"
        f"for n in itertools.count(1):\n  data = bytes([48 + n % 10]) * 3_000_000; {WRITE[how]}\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    writer = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=env)
    seen, deadline = set(), time.monotonic() + 300
    while len(seen) < 10 and time.monotonic() < deadline:
        data = (tmp_path / "name").read_bytes()
        seen.add((len(data), *set(data)))
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    data = (tmp_path / "name").read_bytes()
    assert {(len(data), *set(data))} | seen == {(3_000_000, 48 + digit) for digit in range(10)}


def test_a_failed_move_leaves_the_old_file(tmp_path):
    target = tmp_path / "name"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        move_durably(tmp_path / "absent", target)
    assert target.read_bytes() == b"old"
