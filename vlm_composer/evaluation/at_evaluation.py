"""What is done once an evaluation, beside the metrics."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist, model_eval_mode

from vlm_composer.models.composer_model import ComposerVLM

LABEL = "eval"
"""Of the evaluator at whose end it is done: another may run the same set with wrong images."""


class AtEvaluation(Callback):
    """Looks at the model once an evaluation, as the metrics do: in eval mode, without gradients, in
    the run's precision.

    Nothing in it draws random numbers or reads from a loader, so that a run with it has the bits of
    one without.
    """

    @abstractmethod
    def look(self, state: State, logger: Logger, model: ComposerVLM) -> None:
        """Look at the model; every rank does the same number of forwards, as FSDP2 needs."""

    def eval_end(self, state: State, logger: Logger) -> None:
        """Look, where the right images have been evaluated."""
        if state.dataloader_label != LABEL:
            return
        model: Any = getattr(state.model, "module", state.model)  # DDP's module
        precision = get_precision_context(
            state.precision, state.precision_config, fp8_autocast_enabled=False
        )
        with torch.no_grad(), model_eval_mode(state.model), precision, model.autocast():
            self.look(state, logger, model)


def evenly_chosen(count: int, total: int) -> list[int]:
    """Indices of `count` of `total` samples, evenly spaced; of all where there are not so many."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def my_share(count: int) -> list[tuple[int, bool]]:
    """Deal `count` things to the ranks.

    Returns:
        This rank's places, as many as every other rank's, each with whether it counts: a rank that
        is dealt fewer repeats the first.
    """
    world_size, rank = dist.get_world_size(), dist.get_global_rank()
    places = range(rank, -(-count // world_size) * world_size, world_size)
    return [(place, True) if place < count else (0, False) for place in places]
