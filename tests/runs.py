"""Builds a Trainer as `train.py` does and watches what it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger
from composer.utils import dist

from vlm_composer.config import TrainConfig
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.train import prepare


class Watch(Callback):
    """Keeps every batch's loss, samples and gradients (whole ones, by parameter)."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ids: list[list[str]] = []
        self.batches: list[dict[str, Any]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.batches.append(state.batch)
        self.ids.append(
            [name for ids in dist.all_gather_object(state.batch["ids"]) for name in ids]
        )

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.gradients.append(
            {
                name.removeprefix("module."): whole(p.grad).clone()
                for name, p in state.model.named_parameters()
                if p.grad is not None
            }
        )

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses.append(float(state.total_loss_dict["loss/train/total"]))


@contextmanager
def when_logged(module: str, text: str, action: Callable[[], object]) -> Iterator[list[str]]:
    """Calls `action` once, when a module of the project logs a line that has `text`.

    Yields:
        The line, once it was logged.
    """
    seen: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage() and not seen:
                seen.append(record.getMessage())
                action()

    logger, listener = logging.getLogger(module), Listener()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    try:
        yield seen
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def start(config: TrainConfig) -> tuple[Trainer, VisionLanguageModel, Watch]:
    """What `train.py` does before `fit`, watched."""
    trainer = prepare(config)
    logging.getLogger("vlm_composer").propagate = True  # caplog listens at the root
    model: Any = trainer.state.model
    vlm = getattr(model, "module", model).model
    watch, memory = Watch(), InMemoryLogger()
    trainer.state.callbacks.append(watch)
    memory.init(trainer.state, trainer.logger)
    trainer.logger.destinations = (*trainer.logger.destinations, memory)
    return trainer, vlm, watch


def run(config: TrainConfig) -> tuple[Trainer, VisionLanguageModel, Watch]:
    trainer, vlm, watch = start(config)
    trainer.fit()
    trainer.close()
    return trainer, vlm, watch


def metrics_of(trainer: Trainer) -> dict[str, list[tuple[Any, Any]]]:
    """What the run logged: for each metric, (timestamp, value) pairs."""
    memory = next(d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    return memory.data


def last(trainer: Trainer, name: str) -> float:
    value = metrics_of(trainer)[name][-1][1]
    return value.item() if hasattr(value, "item") else value
