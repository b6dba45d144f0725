"""SIGTERM: the batch in hand is finished and saved; a second one ends at once."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from composer.core import Callback

from runs import run, start
from vlm_composer.training.preemption import EXIT_CODE, Preempted


@pytest.fixture(autouse=True)
def restore_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Terminate(Callback):
    """Sends this process SIGTERM at an event of a batch, twice, as launcher and scheduler do."""

    def __init__(self, event, batch):
        self.at = (event, batch)

    def run_event(self, event, state, logger):
        if self.at == (event.value, state.timestamp.batch.value):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("event", "at", "stops_after"),
    [("batch_start", 2, 3), ("batch_end", 4, 4), ("eval_batch_start", 2, 2)],
)
def test_a_run_that_was_told_to_stop_goes_on_exactly(tiny_config, tmp_path, event, at, stops_after):
    changes = {"max_duration": "6ba", "eval_interval": "2ba"}
    _, expected, watch = run(tiny_config(**changes))
    saving = {"save_folder": str(tmp_path / "s"), "save_interval": "1ep", "autoresume": True}
    trainer, _, first = start(tiny_config(**changes, **saving))
    trainer.state.callbacks.insert(0, Terminate(event, at))
    with pytest.raises(Preempted, match=f"stopped by SIGTERM after batch {stops_after}"):
        trainer.fit()
    trainer.close()
    saved = sorted(path.name for path in (tmp_path / "s").glob("ep*"))
    assert saved == [f"ep0-ba{stops_after}.safetensors"]
    trainer, resumed, second = start(tiny_config(**changes, **saving))
    trainer.fit()
    trainer.close()
    assert len(second.losses) == 6 - stops_after
    assert watch.losses[stops_after:] == second.losses
    assert watch.ids == first.ids[:stops_after] + second.ids
    assert all(map(torch.equal, resumed.connector.parameters(), expected.connector.parameters()))


def test_the_command_says_so_with_its_exit_code(tiny_yaml, tmp_path, capsys, monkeypatch):
    from vlm_composer import train

    prepare = train.prepare

    def prepare_and_terminate(config):
        trainer = prepare(config)
        trainer.state.callbacks.insert(0, Terminate("batch_start", 1))
        return trainer

    monkeypatch.setattr(train, "prepare", prepare_and_terminate)
    path = tiny_yaml(save_folder=str(tmp_path / "s"), autoresume=True)
    assert train.main([str(path)]) == EXIT_CODE == 75
    assert "start the same command again" in capsys.readouterr().err
    assert train.main([str(path)]) == 0


SCRIPT = """
import signal, sys
from vlm_composer.training import preemption
preemption.SAME_SIGNAL_SECONDS = 0.0
preemption.GracefulStop(None).fit_start(None, None)
print("ready", flush=True)
for line in sys.stdin:
    print("still here", flush=True)
"""


def test_a_second_signal_ends_the_process_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.stdin.write("?\n")
    process.stdin.flush()
    assert process.stdout.readline() == "still here\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    process.stdin.close()
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_ranks_save_and_end_when_their_launcher_is_killed(tiny_yaml, tmp_path, number):
    path = tiny_yaml(
        max_duration="100000ba",
        save_folder="{run_folder}/checkpoints",
        autoresume=True,
        device_train_microbatch_size=2,
        log_to_console=True,
        console_log_interval="1ba",
    )
    train = Path(__file__).parents[2] / "vlm_composer" / "train.py"
    command = [Path(sys.executable).with_name("composer"), "-n", "2", train, path]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, **options) as launcher:
        assert launcher.stderr is not None
        for line in launcher.stderr:
            if "loss/train/total" in line:
                break
        ranks = psutil.Process(launcher.pid).children()
        assert len(ranks) == 2
        launcher.send_signal(number)
        assert "SIGTERM: stopping after batch" in launcher.stderr.read()  # until rank 0 ends
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    (saved,) = (tmp_path / "run" / "checkpoints").glob("ep*")
    batch = int(re.search(r"-ba([0-9]+)", saved.name)[1])
    command.append(f"max_duration={batch + 1}ba")
    again = subprocess.run(command, capture_output=True, **options)
    assert again.returncode == 0, again.stderr
    assert f"Resuming after batch {batch} " in again.stderr
