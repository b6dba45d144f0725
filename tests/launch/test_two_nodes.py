"""Two nodes, each with a rank: the shell of a launch template, run twice on this machine."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from composer.utils import get_free_tcp_port
from templates import ROOT, skypilot


def start_node(node: int, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Run what SkyPilot would run on a node."""
    (folder / "yamls").mkdir(parents=True, exist_ok=True)
    (folder / "yamls" / "stage1.yaml").write_text(Path(environment["YAML"]).read_text())
    program = folder / "vlm_composer"
    if not program.exists():
        program.symlink_to(ROOT / "vlm_composer")
    sky = {
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": str(node),
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        ["bash", "-c", skypilot()["run"].replace("29500", environment["PORT"])],
        cwd=folder,
        env=os.environ | sky | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def start_both(tmp_path, shards):
    """Starts two nodes with a yaml; what still runs when the test ends is ended."""
    processes = []

    def start(path: Path) -> list[subprocess.Popen[str]]:
        environment = {
            "YAML": str(path),
            "PORT": str(get_free_tcp_port()),
            "DATA": str(shards),
            "SAVE_FOLDER": str(tmp_path / "saved"),
        }
        # A folder each: launchers leave signal files in theirs.
        pair = [start_node(node, tmp_path / f"node{node}", environment) for node in range(2)]
        processes.extend(pair)
        return pair

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_both_nodes_stop_when_one_is_stopped_and_go_on_together(tiny_yaml, start_both):
    def yaml(max_duration: str) -> Path:
        data = {"local": "${variables.data}/train", "shuffle": True}
        return tiny_yaml(
            variables={"data": "given by the command"},
            train_loader={"dataset": data, "num_workers": 1},
            eval_loader=None,
            max_duration=max_duration,
            log_to_console=True,
            console_log_interval="5ba",
        )

    first, second = start_both(yaml("100000ba"))
    assert first.stdout is not None
    assert any("[batch=10/" in line for line in first.stdout)  # the ranks have met, and train
    second.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [75, 75], outputs
    stopped = re.findall(r"SIGTERM: stopping after batch (\d+)", "".join(outputs))
    assert len(stopped) == 2
    assert len(set(stopped)) == 1

    again = start_both(yaml(f"{int(stopped[0]) + 2}ba"))
    outputs = [process.communicate(timeout=120)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    assert f"Resuming after batch {stopped[0]}" in outputs[0]
