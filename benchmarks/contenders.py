"""Trainings in processes of their own that go on for as many steps as they are told.

Each contender is one long `fit()` or `train()` that stops at the end of a step and waits for an
order, so that set-up and compilation are left out, no two ever run at once, and a step's time is
all that a user waits for: from the end of one to the end of the next, data included.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.faithful_towers import MAX_GRAD_NORM, Shape, read_yaml, training_yaml
from benchmarks.gate import Chunk, Gate, Order, Stopped

_PROCESSES = multiprocessing.get_context("forkserver")
# Imported once, by the server that every contender is forked from.
_PROCESSES.set_forkserver_preload(
    [
        "composer",
        "streaming",
        "transformers.models.llava.modeling_llava",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.siglip.modeling_siglip",
        "transformers.trainer",
    ]
)


def train_ours(
    connection: Connection, shape: Shape, towers: Path, data: Path, out: Path, size: int
) -> None:
    """This project's training as `train.py` runs it, with a gate behind its steps."""
    import torch
    from composer.core import Callback, State
    from composer.loggers import Logger

    from vlm_composer.train import prepare

    losses: list[float] = []
    gate = Gate(connection, losses)

    class AtGate(Callback):
        """Waits at the gate, and trains what the Trainer trained in a bare loop."""

        def __init__(self) -> None:
            self.microbatch: Any = None

        def fit_start(self, state: State, logger: Logger) -> None:
            gate.open()

        def before_dataloader(self, state: State, logger: Logger) -> None:
            gate.chunk.loading.start()

        def after_dataloader(self, state: State, logger: Logger) -> None:
            gate.chunk.loading.stop()

        def before_forward(self, state: State, logger: Logger) -> None:
            self.microbatch = state.batch

        def batch_end(self, state: State, logger: Logger) -> None:
            losses.append(float(state.total_loss_dict["loss/train/total"]))
            gate.step_ended(lambda chunk: self._bare(chunk, state) if gate.order.bare else None)

        def _bare(self, chunk: Chunk, state: State) -> None:
            model: Any = getattr(state.model, "module", state.model)
            (optimizer,) = state.optimizers
            trained = [p for p in model.parameters() if p.requires_grad]
            chunk.bare.start()
            optimizer.zero_grad()
            loss = model.loss(model(self.microbatch), self.microbatch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            loss.item()
            chunk.bare.stop()

    trainer = prepare(read_yaml(training_yaml(shape, towers, data, out / "run.yaml", size)))
    start_from(trainer, towers)
    trainer.state.callbacks.append(AtGate())
    try:
        trainer.fit()
    except Stopped:
        trainer.close()


def start_from(trainer: Any, towers: Path) -> None:
    """Give a Composer Trainer's model the connector of `write_towers`."""
    import torch

    model = getattr(trainer.state.model, "module", trainer.state.model).model
    model.connector.load_state_dict(torch.load(towers / "connector.pt"))


def train_hf(
    connection: Connection,
    shape: Shape,
    towers: Path,
    data: Path,
    out: Path,
    size: int,
    compile_backend: str | None = None,
) -> None:
    """transformers' Trainer, with a gate behind its steps."""
    from transformers import TrainerCallback

    from benchmarks.hf_baseline import build_trainer

    losses: list[float] = []
    gate = Gate(connection, losses)

    class AtGate(TrainerCallback):
        """Waits at the gate."""

        def on_train_begin(self, *args: Any, **options: Any) -> None:
            gate.open()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            gate.step_ended()

    trainer = build_trainer(
        shape,
        towers,
        data,
        out,
        size,
        compile_backend=compile_backend,
        callback=AtGate(),
        losses=losses,
    )
    with contextlib.suppress(Stopped):
        trainer.train()


class Contender:
    """A process, seen from the one that gives it orders.

    Args:
        name: For messages and its log.
        target: Runs in the process, with a connection as its first argument and the folder `out`
            made for it among `options`.
        folder: Where its log and folder are made.
        options: The target's other arguments.
    """

    def __init__(
        self, name: str, target: Callable[..., None], folder: Path, **options: Any
    ) -> None:
        self.name = name
        self._log = folder / f"{name.replace(' ', '-')}.log"
        options["out"] = self._log.with_suffix("")
        options["out"].mkdir()
        self._connection, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(
            target=_run, args=(target, theirs, self._log), kwargs=options
        )
        self._process.start()
        theirs.close()  # so that a process that dies is seen at once

    def give(self, order: Order) -> None:
        """Let it work; `result` says how it went."""
        self._connection.send(order)

    def result(self) -> Any:
        """Wait for what it reports.

        Raises:
            RuntimeError: It failed; the message is the end of its log.
        """
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            tail = "\n".join(self._log.read_text().splitlines()[-25:])
            raise RuntimeError(f"{self.name} failed:\n{tail}") from None

    def run(self, steps: int, **options: bool) -> Chunk:
        """Train `steps` steps and report."""
        self.give(Order(steps, **options))
        return self.result()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def _run(target: Callable[..., None], connection: Connection, log: Path, **options: Any) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Linux's own way to start a loader's workers; here it would be the forkserver's.
    multiprocessing.set_start_method("fork", force=True)
    try:
        target(connection, **options)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # multiprocessing runs none, and streaming frees its memory there
