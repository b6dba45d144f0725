"""Ranks that cannot reach each other say so in one line, with what to do, and end."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from store_server import free_port
from vlm_composer.training.contact import ContactError, explain_lost_contact

ROOT = Path(__file__).parents[2]
MEET_AND_PART = """
import os, sys
import torch
from composer.utils import dist
from vlm_composer.config import TrainConfig
from vlm_composer.training.contact import ContactError, explain_lost_contact, join_ranks

config = TrainConfig.read(sys.argv[1], sys.argv[2:])
print("ready", flush=True)
sys.stdin.readline()
join_ranks("cpu", config.dist_timeout)
if dist.get_global_rank() == 1:
    sys.stdin.read()  # it is silent until then
    os._exit(0)
try:
    with explain_lost_contact(config):
        dist.all_reduce(torch.ones(1))
except ContactError as error:
    print(error)
"""


def start_rank(rank, port, *command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            **{"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        },
    )


@pytest.fixture
def free_ports():
    """Two ports that nobody listens on."""
    ports: set[int] = set()
    while len(ports) < 2:
        ports.add(free_port("127.0.0.1"))
    return tuple(ports)


@pytest.mark.slow
def test_a_preflight_whose_ranks_do_not_meet_tells_it_with_the_rest(tiny_yaml, free_ports):
    command = (ROOT / "vlm_composer" / "train.py", tiny_yaml(dist_timeout=1), "--preflight")
    rank = start_rank(1, free_ports[0], *command)
    said, trace = rank.communicate(timeout=300)
    assert rank.returncode == 1
    assert "Traceback" not in trace
    assert f"could not reach rank 0 at 127.0.0.1:{free_ports[0]} for 1 s (dist_timeout" in said
    assert "✓ shards" in said
    assert "1 failure" in said


@pytest.mark.slow
def test_ranks_that_do_not_meet_say_where_they_waited_and_for_whom(tiny_yaml, free_ports):
    command = (ROOT / "vlm_composer" / "train.py", tiny_yaml(dist_timeout=3))
    ranks = [start_rank(rank, port, *command) for rank, port in enumerate(free_ports)]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "Waiting up to 3 s for 2 ranks at" in said[0]
    first, second = (text.splitlines()[-1] for text in said)
    assert first.startswith(
        f"error on rank 0: waited 3 s (dist_timeout) at 127.0.0.1:{free_ports[0]}, and only 1 of "
        "2 ranks came"
    )
    assert second.startswith(
        f"error on rank 1: could not reach rank 0 at 127.0.0.1:{free_ports[1]} for 3 s"
    )
    assert "Connection refused" in second
    for text in said:
        assert "Traceback" not in text
        assert "frame #" not in text, "torch's own trace"


@pytest.mark.slow
def test_a_port_that_another_program_has_is_named(tiny_yaml):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        rank = start_rank(0, port, ROOT / "vlm_composer" / "train.py", tiny_yaml(dist_timeout=30))
        said = rank.communicate(timeout=300)[1].splitlines()[-1]
    assert rank.returncode == 1
    assert f"could not join the 2 ranks that meet at 127.0.0.1:{port}" in said
    assert "address already in use" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("silent", "words"),
    [
        (True, "one of them did not answer for 10 s (dist_timeout)"),
        (False, "a connection was closed, as when another rank has ended: its log says why"),
    ],
)
def test_contact_lost_says_how_and_how_to_go_on(tiny_yaml, free_ports, silent, words):
    path = tiny_yaml(dist_timeout=10, save_folder="{run_folder}/saved")
    ranks = [start_rank(rank, free_ports[0], "-c", MEET_AND_PART, path) for rank in range(2)]
    for rank in ranks:  # imports take longer than they may wait for each other
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    first, second = ranks
    if not silent:
        second.stdin.close()
    said, trace = first.communicate(timeout=300)
    second.kill()
    second.wait()
    assert said.startswith(f"lost contact with the other ranks: {words}"), trace
    assert said.endswith("start the same command on every node with autoresume: true\n")
    assert len(said.splitlines()) == 1


def test_other_errors_keep_their_trace(tiny_config):
    config = tiny_config()
    with pytest.raises(RuntimeError, match="shapes") as raised, explain_lost_contact(config):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(raised.value, ContactError)
