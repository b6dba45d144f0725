"""Builds a Trainer as `train.py` does and watches what it does."""

from __future__ import annotations

from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger
from composer.utils import dist, reproducibility

from vlm_composer.assembly import (
    assemble_encoder,
    assemble_evaluators,
    assemble_model,
    assemble_template,
    assemble_train_loader,
)
from vlm_composer.config import TrainConfig
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.training.trainer import build_trainer


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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def start(config: TrainConfig) -> tuple[Trainer, VisionLanguageModel, Watch]:
    """Everything that `train.py` does before `fit`."""
    template = assemble_template(config)
    reproducibility.seed_all(config.seed)
    vlm = assemble_model(config, "cpu", template.image_token_id)
    encoder = assemble_encoder(config, template, vlm.vision_tower.image_size)
    train = assemble_train_loader(config, encoder, "cpu")
    evaluators = assemble_evaluators(config, encoder, "cpu")
    trainer = build_trainer(config, vlm, train, evaluators, "cpu")
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
