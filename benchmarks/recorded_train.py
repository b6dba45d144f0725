"""`vlm_composer/train.py`, recorded and disturbed: what the resumption matrix launches.

The training is the product's own; this adds a callback to its Trainer. From the environment:

RECORD: file that every batch's loss, learning rate and sample ids are appended to, by rank 0
KILL: `rank:batch:moment`: SIGKILL that rank at that moment (an event of Composer) of that batch
TERM_AT: `batch`: send SIGTERM in that batch to the launchers that have this in their environment
GATE: `batch:folder`: before that batch, make `folder/reached` and wait for `folder/go`
DROPOUT: probability of a dropout behind the connector, so that the run draws random numbers
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from vlm_composer import train
from vlm_composer.config import TrainConfig


class Recorder(Callback):
    """Writes what every batch computed, and does what the environment says."""

    def __init__(self) -> None:
        self.record = Path(os.environ["RECORD"])
        self.kill = os.environ.get("KILL", "").split(":")
        self.term = os.environ.get("TERM_AT")
        self.gate = os.environ.get("GATE", "").split(":")
        self.ids: list[list[str]] = []

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        batch = state.timestamp.batch.value
        if self.kill == [str(dist.get_global_rank()), str(batch), event.value]:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self.gate[0] == str(state.timestamp.batch.value):
            folder = Path(self.gate[1])
            (folder / "reached").touch()
            while not (folder / "go").exists():
                time.sleep(0.02)

    def batch_start(self, state: State, logger: Logger) -> None:
        self.ids = dist.all_gather_object(state.batch["ids"])
        if self.term == str(state.timestamp.batch.value) and dist.get_local_rank() == 0:
            self._stop_launcher()

    def batch_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            row = {
                "batch": state.timestamp.batch.value,
                "loss": state.total_loss_dict["loss/train/total"],
                "lr": state.optimizers[0].param_groups[0]["lr"],
                "ids": [name for ids in self.ids for name in ids],
                "time": time.time(),
            }
            with self.record.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _stop_launcher(self) -> None:
        """SIGTERM to the launcher; this batch goes on once the launcher's own has come here."""
        stop, came = signal.getsignal(signal.SIGTERM), []

        def note(number: int, frame: FrameType | None) -> None:
            came.append(number)
            stop(number, frame)

        signal.signal(signal.SIGTERM, note)
        os.kill(os.getppid(), signal.SIGTERM)
        while not came:
            time.sleep(0.01)
        signal.signal(signal.SIGTERM, stop)


def prepare(config: TrainConfig) -> Trainer:
    """The product's own, with a recorder and, where it is asked for, dropout."""
    trainer = product_prepare(config)
    trainer.state.callbacks.insert(0, Recorder())  # before the one that stops at SIGTERM
    if probability := float(os.environ.get("DROPOUT", "0")):

        def drop(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(output, probability, training=module.training)

        model: Any = trainer.state.model
        getattr(model, "module", model).model.connector.register_forward_hook(drop)
    return trainer


if __name__ == "__main__":
    product_prepare, train.prepare = train.prepare, prepare
    sys.exit(train.main(sys.argv[1:]))
