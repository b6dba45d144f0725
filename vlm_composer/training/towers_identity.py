"""Which frozen towers a connector was trained between, down to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import xxhash
from torch import nn

from vlm_composer.config import TrainConfig
from vlm_composer.config.model import TowerConfig
from vlm_composer.data.features import Features, FeaturesError
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.training.checkpoint_file import CheckpointError, hash_tensor
from vlm_composer.training.trained_weights import clean_name, whole

Identity = dict[str, dict[str, Any]]
"""For each tower: name and revision as the yaml has them, dtype, hashes of configuration and
weights."""

_COMPARED = ("dtype", "config_hash", "weights_hash")
"""Entries of an identity in which two towers must not differ."""
_VOLATILE = ("transformers_version", "torch_dtype", "architectures")
"""Entries of a Hugging Face configuration that do not change what the model computes."""


def identify_towers(config: TrainConfig, model: VisionLanguageModel) -> Identity:
    """Hash the configurations and weights of both towers."""
    return {
        "vision_tower": identify_tower(config.vision_tower, model.vision_tower),
        "language_model": identify_tower(config.language_model, model.language_model),
    }


def identify_tower(tower: TowerConfig, module: VisionTower | LanguageModel) -> dict[str, Any]:
    """Hash the configuration and weights of a tower."""
    return {
        "name": tower.name,
        "revision": tower.revision,
        "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        "config_hash": hash_config(module.model.config, getattr(tower, "image_size", None)),
        "weights_hash": hash_weights(module),
    }


def hash_weights(module: nn.Module, *, prefix: str = "", dtype: torch.dtype | None = None) -> str:
    """One hash over every parameter; under FSDP2 all ranks must call this.

    17 GB take a core 2 to 4 seconds.

    Args:
        module: A tower.
        prefix: What the parameters' names begin with in a tower, for a module that is a part of it.
        dtype: Hash what the parameters would be in this dtype; their own when None.
    """
    digest = xxhash.xxh3_128()
    named = sorted((prefix + clean_name(n), p) for n, p in module.named_parameters())
    for name, parameter in named:
        tensor = whole(parameter)
        digest.update(f"{name} {hash_tensor(tensor.to(dtype or tensor.dtype))}".encode())
    return digest.hexdigest()


def check_towers(
    saved: Identity, here: Identity, path: object, keys: Sequence[str] = _COMPARED
) -> None:
    """Refuse a checkpoint of a connector that was trained between other towers.

    Args:
        saved: Those of the checkpoint.
        here: Those to be used.
        path: What messages call the checkpoint.
        keys: Entries to compare.

    Raises:
        CheckpointError: Dtype, configuration or weights of a tower are not those of the checkpoint.
    """
    for tower, ours in here.items():
        if difference := _difference(saved[tower], ours, keys):
            raise CheckpointError(
                f"{path} was trained with another {tower}: {difference}; "
                "use the same tower, or train a new connector"
            )


def check_features(features: Iterable[Features], here: Identity) -> None:
    """Refuse features that another vision tower made.

    Raises:
        FeaturesError: Dtype, configuration or weights of the tower are not those of the features.
    """
    for theirs in features:
        if difference := _difference(theirs.vision_tower, here["vision_tower"]):
            raise FeaturesError(
                f"the data set's features are of another vision_tower: {difference}; use the same "
                "tower, or write features of this one with `python -m convert.features`"
            )


def _difference(
    theirs: dict[str, Any], ours: dict[str, Any], keys: Sequence[str] = _COMPARED
) -> str | None:
    """Say in what two identities differ; None where they do not."""
    for key in keys:
        if theirs[key] != ours[key]:
            return (
                f"{key} {theirs[key]} ({_names(theirs)}), this run has {ours[key]} ({_names(ours)})"
            )
    return None


def _names(identity: dict[str, Any]) -> str:
    revision = identity["revision"]
    return f"{identity['name']}{f' at {revision}' if revision else ''}"


def hash_config(config: Any, image_size: int | None) -> str:
    """Hash what a Hugging Face configuration says of the computation."""
    entries = {
        key: value
        for key, value in config.to_dict().items()
        if not key.startswith("_") and key not in _VOLATILE
    }
    text = json.dumps([entries, image_size], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())
