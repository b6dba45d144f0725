"""Simulated hosts are apart, their cables can be pulled, and they end with who made them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.simulated_hosts import BRIDGE_ADDRESS, SimulatedHosts, why_not

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def possible():
    if reason := why_not():
        pytest.skip(f"hosts need root, ip and namespaces: {reason}")


def output(host, *command):
    return subprocess.run(
        host.command(*command), check=True, capture_output=True, text=True
    ).stdout.split()


def reaches(host, address):
    """Whether a connection is answered, be it with a refusal; a pulled cable swallows it."""
    attempt = f"import socket; socket.create_connection(({address!r}, 9), timeout=1)"
    done = subprocess.run(
        host.command(sys.executable, "-c", attempt), capture_output=True, text=True
    )
    return "ConnectionRefusedError" in done.stderr


def test_each_has_its_own_files_name_and_memory(tmp_path):
    with SimulatedHosts(2, tmp_path, tmp_path / "own") as hosts:
        for host in hosts:
            seen = output(host, "sh", "-c", "hostname; pwd; ls . /dev/shm; touch mine /dev/shm/it")
            assert seen[:2] == [host.name, str(tmp_path / "own")]
            assert "mine" not in seen
            assert "it" not in seen


def test_a_pulled_cable_cuts_a_host_off(tmp_path):
    with SimulatedHosts(2, tmp_path, tmp_path / "own") as (first, second):
        assert reaches(first, "host1")
        second.pull_cable()
        assert not reaches(first, "host1")
        assert not reaches(second, BRIDGE_ADDRESS)
        assert reaches(first, BRIDGE_ADDRESS)
        second.plug_cable()
        assert reaches(first, "host1")


def test_this_thread_is_on_the_bridge_and_comes_back(tmp_path):
    before = os.readlink("/proc/thread-self/ns/net")
    with SimulatedHosts(1, tmp_path, tmp_path / "own"):
        assert os.readlink("/proc/thread-self/ns/net") != before
    assert os.readlink("/proc/thread-self/ns/net") == before


SCRIPT = """
import subprocess, sys, time
from pathlib import Path
from benchmarks.simulated_hosts import SimulatedHosts

with SimulatedHosts(1, Path(sys.argv[1]), Path(sys.argv[1], "own")) as (host,):
    subprocess.Popen(host.command("setsid", "sleep", "1000"))
    while not host.processes():
        time.sleep(0.02)
    print(*host.processes(), host.pid, flush=True)
    time.sleep(1000)
"""


def test_they_end_with_a_maker_that_is_killed(tmp_path):
    maker = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert maker.stdout is not None
    processes = [Path("/proc", pid) for pid in maker.stdout.readline().split()]
    assert len(processes) >= 2
    assert all(path.exists() for path in processes)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    maker.stdout.close()
    deadline = time.monotonic() + 10
    while any(path.exists() for path in processes):
        assert time.monotonic() < deadline, "they outlive their maker"
        time.sleep(0.02)
