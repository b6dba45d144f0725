"""Callbacks that end a run which is going wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from vlm_composer.training.towers_identity import Identity, hash_weights


class TrainabilityError(RuntimeError):
    """What is frozen was trained, or what is trained was not."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class ShortEpochError(RuntimeError):
    """An epoch gave fewer samples than it has."""


class ShortEpochGuard(Callback):
    """Fail at an epoch that ended early: a loader that lost its store must not pass for one that is
    through.

    It counts samples: an epoch may have been begun in batches of another size.
    """

    def __init__(self) -> None:
        self._resumed_at: dict[int, int] = {}
        """Epoch → samples of it that were trained before this process."""

    def fit_start(self, state: State, logger: Logger) -> None:
        """Note the position in the epoch."""
        del logger
        self._resumed_at = {state.timestamp.epoch.value: state.timestamp.sample_in_epoch.value}

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Compare the samples that were trained with those that the loader has."""
        del logger
        ended = state.previous_timestamp
        assert ended is not None
        assert state.dataloader_len is not None
        loader: Any = state.train_dataloader
        expected = loader.dataset.epoch_size
        if loader.drop_last:
            begun, ranks = self._resumed_at.get(ended.epoch.value, 0), dist.get_world_size()
            batches = max(math.ceil((expected - begun) / ranks), 0) // loader.batch_size
            expected = begun + batches * loader.batch_size * ranks
        if ended.sample_in_epoch < expected:
            raise ShortEpochError(
                f"epoch {ended.epoch.value} ended after {ended.batch_in_epoch.value} of "
                f"{state.dataloader_len.value} batches and {ended.sample_in_epoch.value} of "
                f"{expected} samples; resume from the last checkpoint"
            )


class TowerGuard(Callback):
    """Fail where a frozen weight is not, at the end of the run, what it was at the start.

    Args:
        towers: Hashes of both towers, taken before training.
    """

    def __init__(self, towers: Identity) -> None:
        self.towers = towers

    def fit_end(self, state: State, logger: Logger) -> None:
        """Hash the towers again."""
        del logger
        model = getattr(state.model, "module", state.model).model
        for name, identity in self.towers.items():
            found = hash_weights(getattr(model, name))
            if found != identity["weights_hash"]:
                raise TrainabilityError(
                    f"{name} is frozen, yet its weights changed: their hash was "
                    f"{identity['weights_hash']} at the start and is {found} now"
                )


class FreezeGuard(Callback):
    """Fail when a frozen weight gets a gradient, or a trained one none in the first step."""

    def __init__(self) -> None:
        self._first_step = True

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Look at the gradients of all micro-batches together."""
        del logger
        named = list(state.model.named_parameters())
        if wrong := [n for n, p in named if not p.requires_grad and p.grad is not None]:
            raise TrainabilityError(
                f"{len(wrong)} frozen parameter(s) got a gradient, the first is {wrong[0]}"
            )
        if not self._first_step:
            return
        self._first_step = False
        trained = [(n, p) for n, p in named if p.requires_grad]
        if not trained:
            raise TrainabilityError("no parameter is trained")
        if without := [n for n, p in trained if p.grad is None]:
            raise TrainabilityError(
                f"{len(without)} of {len(trained)} trained parameters got no gradient in the first "
                f"step, the first is {without[0]}"
            )
        largest = torch.stack([_local(p.grad).abs().max() for _, p in trained]).max()
        dist.all_reduce(largest, reduce_operation="MAX")
        if largest.item() == 0:
            raise TrainabilityError(
                "every gradient of the first step is zero: the loss does not depend on the "
                "connector"
            )


def _local(gradient: torch.Tensor | None) -> torch.Tensor:
    """This rank's part of a gradient; a zero where its part is empty."""
    assert gradient is not None
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local if local.numel() else torch.zeros(1, device=local.device)


class NaNGuard(Callback):
    """Fail at a loss that is not finite, and name the samples. Composer's NaNMonitor lets inf
    pass."""

    def after_loss(self, state: State, logger: Logger) -> None:
        """Look at the loss of a micro-batch, before it reaches a weight."""
        del logger
        loss = state.loss
        assert isinstance(loss, torch.Tensor)
        if not torch.isfinite(loss).all():
            raise NonFiniteLossError(
                f"batch {state.timestamp.batch.value}: the loss is {loss.item()} for samples "
                f"{', '.join(state.batch['ids'])}; lower optimizer.lr, lengthen scheduler.t_warmup "
                "or clip gradients, and resume from the last checkpoint"
            )
