"""Patches of the frozen vision tower in place of images: how they are stored, and whose they are.

`python -m convert.features` writes them as MDS shards: id, prompt, answer and `patches` (N, V).
Beside the shards of a side stands `features.json`, a :class:`Features`: what reads the bytes, and
what training compares with its own vision tower before it trusts them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_composer.config.data import ImageDecoder
from vlm_composer.mds.encodings import array_encoding
from vlm_composer.mds.index import FEATURES_FILE, Index
from vlm_composer.mds.json_object import MAX_JSON_BYTES, is_count, parse_object, shown

FeatureDtype = Literal["bf16", "fp16", "fp32"]

_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STORED = {"bf16": "uint16", "fp16": "float16", "fp32": "float32"}
"""numpy has no bf16: its bits are stored."""


class FeaturesError(ValueError):
    """Features are not those of this run, or no features at all."""


@dataclass(frozen=True)
class VisionSettings:
    """How a yaml's vision tower sees an image: all that its weights do not say."""

    layer: int
    """Whose output is taken."""
    image_size: int
    """Side in pixels."""
    image_mean: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]."""
    image_std: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]."""
    resample: int
    """PIL's filter."""
    image_decoder: ImageDecoder
    """Who decodes and scales."""


@dataclass(frozen=True)
class Features:
    """What the patches of a data set are."""

    vision_tower: dict[str, Any]
    """Identity of the tower that made them, see `training.towers_identity`."""
    settings: VisionSettings
    dtype: FeatureDtype
    num_patches: int
    """Patches an image (N)."""
    hidden_size: int
    """Width of a patch (V)."""
    shuffle_units: list[int]
    """Samples of each shard of the images. streaming shuffles shard by shard: with these in place
    of its own shards' the order of training is that of the images."""

    @classmethod
    def read(cls, path: Path, place: object = None) -> Self:
        """Read a `features.json`.

        Args:
            path: The file.
            place: What messages call it, where that is not its path.

        Raises:
            FeaturesError: It is none.
            OSError: It cannot be read.
        """
        try:
            with path.open("rb") as file:
                entries = parse_object(file.read(MAX_JSON_BYTES + 1))
            settings: dict[str, Any] = entries.pop("settings")
            for key in ("image_mean", "image_std"):
                settings[key] = tuple(settings[key])
            features = cls(settings=VisionSettings(**settings), **entries)
            features._check_types()
            return features
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FeaturesError(
                f"{place or path} does not describe features ({error!r}); write them again with "
                "`python -m convert.features`"
            ) from error

    def _check_types(self) -> None:
        """Raise ValueError unless every value is of its type; they come from a file."""
        settings, tower = self.settings, self.vision_tower
        for key, value, is_right in (
            ("dtype", self.dtype, self.dtype in get_args(FeatureDtype)),
            ("num_patches", self.num_patches, is_count(self.num_patches)),
            ("hidden_size", self.hidden_size, is_count(self.hidden_size)),
            ("shuffle_units", self.shuffle_units, _are_counts(self.shuffle_units)),
            ("vision_tower", tower, _is_identity(tower)),
            ("layer", settings.layer, type(settings.layer) is int),
            ("image_size", settings.image_size, is_count(settings.image_size)),
            ("resample", settings.resample, is_count(settings.resample)),
            ("image_mean", settings.image_mean, _are_numbers(settings.image_mean)),
            ("image_std", settings.image_std, _are_numbers(settings.image_std)),
            ("image_decoder", settings.image_decoder, type(settings.image_decoder) is str),
        ):
            if not is_right:
                raise ValueError(f"{key} {shown(value)}")
        assert self.columns  # raises ValueError where no column has such patches

    def to_json(self) -> str:
        """The text of `features.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def kind(self) -> dict[str, Any]:
        """What features must have in common to be mixed."""
        patches = f"{self.num_patches} × {self.hidden_size}"
        tower = {k: v for k, v in self.vision_tower.items() if k not in ("name", "revision")}
        return {"dtype": self.dtype, "patches": patches, "vision_tower": tower}

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the patches."""
        return _TORCH[self.dtype]

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample's patches."""
        return self.num_patches * self.hidden_size * self.torch_dtype.itemsize

    @property
    def columns(self) -> dict[str, str]:
        """Column name → MDS encoding."""
        patches = array_encoding(_STORED[self.dtype], (self.num_patches, self.hidden_size))
        return {"id": "str", "patches": patches, "prompt": "str", "answer": "str"}

    def encode(self, patches: Tensor) -> NDArray[Any]:
        """Round patches (B, N, V) to the dtype and give what a shard stores, on the CPU.

        Raises:
            FeaturesError: A value is too large for the dtype, or not finite at all.
        """
        rounded = patches.to(self.torch_dtype).cpu()
        if not rounded.isfinite().all():
            raise FeaturesError(
                f"patches of up to {patches.abs().max().item():.3g} are not finite in "
                f"{self.dtype}; bf16 and fp32 hold the largest numbers"
            )
        if rounded.dtype == torch.bfloat16:
            rounded = rounded.view(torch.int16)
        return rounded.numpy().view(_STORED[self.dtype])

    def decode(self, stored: NDArray[Any], patches: Tensor) -> None:
        """Write what a shard stores of an image to `patches` (N, V), of the dtype."""
        # By numpy: torch warns of an array that may not be written to, as streaming gives them.
        np.copyto(patches.view(torch.uint8).numpy(), stored.view(np.uint8))

    def check_index(self, index: Index, place: object) -> None:
        """Refuse features of other shards.

        Args:
            index: Of the shards.
            place: What messages call them.

        Raises:
            FeaturesError: They hold other samples or other columns than these describe.
        """
        if (told := sum(self.shuffle_units)) != index.samples:
            raise FeaturesError(
                f"{place}: {FEATURES_FILE} tells of {told} samples, the shards hold "
                f"{index.samples}; write the features again"
            )
        if index.columns != self.columns:
            raise FeaturesError(
                f"{place}: {FEATURES_FILE} describes the columns {shown(self.columns)}, the shards "
                f"have {shown(dict(index.columns))}; write the features again"
            )

    def check_settings(self, here: VisionSettings, place: object) -> None:
        """Refuse features of images that this run would look at in another way.

        Args:
            here: This run's.
            place: Where the features are, for the message.

        Raises:
            FeaturesError: A setting differs.
        """
        for key in (field.name for field in fields(here)):
            theirs, ours = getattr(self.settings, key), getattr(here, key)
            if theirs != ours:
                raise FeaturesError(
                    f"{place} holds features of another vision tower: {key} {theirs}, this run "
                    f"has {ours}; use the same, or write features for this one"
                )


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(is_count(value) and value for value in values)


def _are_numbers(values: object) -> bool:
    return isinstance(values, tuple) and all(type(value) in (int, float) for value in values)


def _is_identity(tower: object) -> bool:
    """Whether a tower's identity has what is compared and printed of it."""
    return (
        isinstance(tower, dict)
        and {"name", "revision", "dtype", "config_hash", "weights_hash"} <= tower.keys()
        and all(value is None or isinstance(value, str) for value in tower.values())
    )


def check_alike(found: Mapping[str, Features | None]) -> None:
    """Refuse data sets that cannot be mixed: images with features, or features of two kinds.

    Args:
        found: What each is of, by its name; None for images.

    Raises:
        FeaturesError: They differ.
    """
    for (name, first), (other_name, other) in pairwise(found.items()):
        if first is None or other is None:
            if first is not other:
                kinds = [
                    "images" if features is None else "features" for features in (first, other)
                ]
                raise FeaturesError(
                    f"{name} holds {kinds[0]} and {other_name} holds {kinds[1]}; the streams of a "
                    "loader must all be of one kind"
                )
            continue
        for key, value in first.kind.items():
            if value != other.kind[key]:
                raise FeaturesError(
                    f"{name} and {other_name} hold features of two kinds: {key} {value} and "
                    f"{other.kind[key]}; write them with the same tower and --dtype"
                )
