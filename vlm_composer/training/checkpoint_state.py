"""Everything that a run needs to go on as if it had never stopped, out of a Trainer and back.

Weights, optimizer and random state are tensors; position, learning rate and what callbacks keep are
JSON. Both are independent of the parallelism and of the number of ranks. A rank's random state is
its own, so that on another number of ranks only what does not draw (all of this project) is exact.
"""

from __future__ import annotations

import datetime
import logging
from typing import Any, NamedTuple

import composer
import numpy as np
import streaming
import torch
from composer.core import State
from composer.loggers import ProgressBarLogger
from composer.utils import dist, reproducibility
from torch import Tensor
from torch.optim import Optimizer

from vlm_composer.config import TrainConfig
from vlm_composer.config.changes import changed_order, differences
from vlm_composer.training.checkpoint_file import CheckpointError, CheckpointFile, check_names
from vlm_composer.training.checkpoint_schema import CALLBACKS, CLOCKS, MOMENTS, WEIGHTS
from vlm_composer.training.trained_weights import spread, trained_weights, whole

log = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """What a checkpoint holds. Tensors are copies on the CPU, on rank 0 only."""

    tensors: dict[str, Tensor]
    document: dict[str, Any]


def capture(state: State) -> Snapshot:
    """Take a snapshot between two batches; all ranks must call this."""
    tensors: dict[str, Tensor] = {}
    optimizer = _optimizer(state)
    keep = dist.get_global_rank() == 0
    for name, parameter in trained_weights(state.model):
        moments = optimizer.state[parameter]
        values = {WEIGHTS + name: parameter, f"optimizer.step.{name}": moments["step"]}
        values |= {f"optimizer.{moment}.{name}": moments[moment] for moment in MOMENTS}
        for key, value in values.items():
            full = whole(value)
            if keep:
                tensors[key] = full.cpu().clone(memory_format=torch.contiguous_format)
    ranks = reproducibility.get_rng_state()
    document = {
        "timestamp": _timestamp_to_json(state),
        "lr": [float(group["lr"]) for group in optimizer.param_groups],
        "dataset": _dataset(state).state_dict(
            num_samples=state.timestamp.sample_in_epoch.value, from_beginning=True
        ),
        "data": _dataset(state).fingerprint,
        "callbacks": {
            type(callback).__name__: kept
            for callback in state.callbacks
            if not isinstance(callback, ProgressBarLogger) and (kept := callback.state_dict())
        },
        "rng": [],
        "world_size": dist.get_world_size(),
        "versions": {
            "torch": torch.__version__,
            "composer": composer.__version__,
            "streaming": streaming.__version__,
        },
    }
    if keep:
        for rank, generators in enumerate(ranks):
            document["rng"].append(_rng_to_json(rank, generators, tensors))
    return Snapshot(tensors, document)


def restore_weights(state: State, checkpoint: CheckpointFile | None) -> None:
    """Load the trained weights; all ranks must call this, rank 0 with the checkpoint."""
    with torch.no_grad():
        for name, parameter in trained_weights(state.model):
            saved = checkpoint.tensor(WEIGHTS + name) if checkpoint else None
            parameter.copy_(spread(saved, parameter))


def restore_progress(
    state: State, checkpoint: CheckpointFile | None, document: dict[str, Any]
) -> list[dict[str, Any]]:
    """Load the optimizer and the position; all ranks must call this, rank 0 with the checkpoint.

    Args:
        state: Of a Trainer that has not trained yet.
        checkpoint: The file, on rank 0.
        document: Its document, on every rank.

    Returns:
        The random state of every rank, for `RestoreRNG`.
    """
    optimizer = _optimizer(state)
    for name, parameter in trained_weights(state.model):
        moments = {}
        for moment in MOMENTS:
            saved = checkpoint.tensor(f"optimizer.{moment}.{name}") if checkpoint else None
            moments[moment] = spread(saved, parameter)
        step = torch.zeros((), device=parameter.device)
        saved = checkpoint.tensor(f"optimizer.step.{name}") if checkpoint else None
        optimizer.state[parameter] = {"step": spread(saved, step), **moments}
    for group, lr in zip(optimizer.param_groups, document["lr"], strict=True):
        group["lr"] = lr
    state.timestamp.load_state_dict(_timestamp_from_json(document["timestamp"]))
    _dataset(state).load_state_dict(_position(state, document))
    state.dataset_resumption["train"] = True  # Composer then leaves skipping to the data set
    for callback in state.callbacks:
        name = type(callback).__name__
        if name in CALLBACKS and (kept := document["callbacks"].get(name)):
            callback.load_state_dict(kept)
    generators = [
        _rng_from_json(rank, kept, checkpoint) if checkpoint else None
        for rank, kept in enumerate(document["rng"])
    ]
    shared: list[Any] = [generators]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def check_fits(state: State, checkpoint: CheckpointFile) -> None:
    """Raise CheckpointError unless the checkpoint is of this run's connector."""
    check_names(dict(trained_weights(state.model)), checkpoint.weights(), checkpoint.url)


def is_inside_epoch(document: dict[str, Any], config: TrainConfig) -> bool:
    """Return whether the run, or the one that saved the checkpoint, would read more of its epoch.

    A checkpoint of an epoch's last batch is saved before the epoch ends.

    Args:
        document: Of the checkpoint.
        config: This run's.
    """
    timestamp, saved = document["timestamp"], document["settings"]
    if timestamp["batch_in_epoch"] == 0:
        return False
    left = _epoch_samples(document["data"]) - timestamp["sample_in_epoch"]
    least = 1
    if saved["train_loader"]["drop_last"] and config.train_loader.drop_last:
        least = min(saved["global_train_batch_size"], config.global_train_batch_size)
    return left >= least


def check_order(document: dict[str, Any], config: TrainConfig, url: str) -> None:
    """Raise CheckpointError where the rest of a checkpoint's epoch would be read in another order,
    or in other batches, than its beginning."""
    changed = changed_order(document["settings"], config)
    if changed and is_inside_epoch(document, config):
        raise CheckpointError(
            f"{url} is inside an epoch, at sample {document['timestamp']['sample_in_epoch']} of "
            f"{_epoch_samples(document['data'])}, where these cannot change: {', '.join(changed)}. "
            "Set them back until the epoch ends, or start from its weights alone (load_path with "
            "load_weights_only: true)"
        )


def check_data(state: State, checkpoint: CheckpointFile) -> None:
    """Raise CheckpointError unless the checkpoint's position is one in this run's data set."""
    saved, here = checkpoint.document["data"], _dataset(state).fingerprint
    if saved != here:
        raise CheckpointError(
            f"{checkpoint.url} is of a run over other data: "
            f"{', '.join(differences(saved, here))}; use the same, or load_path with "
            "load_weights_only: true"
        )


def _epoch_samples(data: dict[str, Any]) -> int:
    """Samples of an epoch over data with this fingerprint."""
    if "epoch_size" in data:
        return data["epoch_size"]
    streams = [data] if "samples" in data else data.values()
    return sum(stream["samples"] for stream in streams)


def _position(state: State, document: dict[str, Any]) -> dict[str, Any]:
    """Return the data set's position.

    streaming 0.13 keeps no number of an epoch that has not begun: between epochs its own state
    would repeat the last one. Of the seed and the canonical nodes it takes what was saved, for all
    epochs to come; here they are this run's, which `check_order` has compared within an epoch.
    """
    timestamp, dataset = document["timestamp"], _dataset(state)
    return {
        **document["dataset"],
        "epoch": timestamp["epoch"],
        "sample_in_epoch": timestamp["sample_in_epoch"],
        "num_canonical_nodes": dataset.num_canonical_nodes,
        "shuffle_seed": dataset.shuffle_seed,
    }


def _optimizer(state: State) -> Optimizer:
    (optimizer,) = state.optimizers
    return optimizer


def _dataset(state: State) -> Any:
    return state.train_dataloader.dataset  # type: ignore[union-attr]


def _timestamp_to_json(state: State) -> dict[str, Any]:
    saved = state.timestamp.state_dict()
    return saved | {clock: saved[clock].total_seconds() for clock in CLOCKS}


def _timestamp_from_json(saved: dict[str, Any]) -> dict[str, Any]:
    return saved | {clock: datetime.timedelta(seconds=saved[clock]) for clock in CLOCKS}


def _rng_to_json(rank: int, generators: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Put a rank's torch and CUDA states among the tensors; return the rest."""
    for name in ("torch", "cuda"):
        if name in generators:
            tensors[f"rng.{rank}.{name}"] = generators[name].clone()
    kind, keys, *rest = generators["numpy"]
    version, words, gauss = generators["python"]
    return {"numpy": [kind, keys.tolist(), *rest], "python": [version, list(words), gauss]}


def _rng_from_json(rank: int, kept: Any, checkpoint: CheckpointFile) -> dict[str, Any]:
    kind, keys, *rest = kept["numpy"]
    version, words, gauss = kept["python"]
    generators: dict[str, Any] = {
        "numpy": (kind, np.array(keys, dtype=np.uint32), *rest),
        "python": (version, tuple(words), gauss),
    }
    for name in ("torch", "cuda"):
        if f"rng.{rank}.{name}" in checkpoint.names:
            generators[name] = checkpoint.tensor(f"rng.{rank}.{name}")
    return generators
