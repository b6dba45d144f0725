"""How long a sequence a language model can read, from its configuration alone.

A table of learned or precomputed positions (OPT, GPT-2, GPT-J, MPT's ALiBi) ends in an IndexError
in the middle of a run; rotary positions beyond those of the training only give a worse model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_WITHOUT_POSITIONS = ("bloom", "rwkv")
"""Model types that read any length whatever their configuration says: ALiBi and recurrence."""
_STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of rotary scaling whose factor is not yet in `max_position_embeddings`, as vLLM reads it;
that of llama3 and longrope is."""


def count_positions(config: PretrainedConfig) -> tuple[int, str] | None:
    """Return how many tokens a language model can read, and the key of its configuration that says
    so; None where nothing limits them.

    Args:
        config: Of the model, or of one that contains it.
    """
    config = config.get_text_config()
    if config.model_type in _WITHOUT_POSITIONS or getattr(config, "alibi", False):
        return None
    key = next((key for key in _KEYS if isinstance(getattr(config, key, None), int)), None)
    if key is None or (positions := getattr(config, key)) < 1:  # XLNet's -1
        return None
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None)
    if isinstance(scaling, Mapping):
        positions = max(positions, *(_stretched(part, positions) for part in _each(scaling)))
    if hasattr(config, "rope_theta") and isinstance(
        longer := getattr(config, "model_max_length", None), int
    ):  # Command R: the other key is the length that it was trained with first
        positions, key = max((positions, key), (longer, "model_max_length"))
    return positions, key


def _each(scaling: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The scaling of all layers, or those of each type of layer."""
    parts = [part for part in scaling.values() if isinstance(part, Mapping)]
    return parts or [scaling]


def _stretched(scaling: Mapping[str, Any], positions: int) -> int:
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind not in _STRETCHED or not factor:
        return positions
    return int((scaling.get("original_max_position_embeddings") or positions) * factor)
