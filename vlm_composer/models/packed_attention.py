"""Attention within the samples of a packed row, for any causal language model of transformers.

It sees a padded view (B, T), causal and without a mask: padding stands on the right, so that no
token of a sample can look at it, and what padding computes is dropped. Without a mask torch keeps
its fused kernels on a GPU. transformers' `AttentionInterface` hands the function to its models.

Shape suffixes: N tokens of all samples, B samples, T tokens of the longest one, H query heads, G
key and value heads, C width of a head.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from vlm_composer.models.packing import PackedRows
from vlm_composer.models.prompt_cache import PromptRows

PACKED_ATTENTION = "packed_rows"
"""Name of `packed_attention` among transformers' attention functions."""


Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Causal attention: queries (B, T, H, C), keys and values (B, T, G, C), scale → (B, T, H, C)."""

_chosen: Kernel | None = None


@contextlib.contextmanager
def attention_kernel(kernel: Kernel) -> Iterator[None]:
    """Have `packed_attention` compute by `kernel` and not by what suits the device."""
    global _chosen
    before, _chosen = _chosen, kernel
    try:
        yield
    finally:
        _chosen = before


@contextlib.contextmanager
def attention(config: Any, name: str) -> Iterator[None]:
    """Have a model's configuration name another of transformers' attention functions."""
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model takes `packed_attention`; `self_check` tells whether that is enough.

    Its attention must be that of transformers' interface, and its masks those of the library, which
    makes none for a function that brings none: a mask of a model's own would be (N, N).
    """
    return model._supports_attention_backend and hasattr(
        sys.modules[type(model).__module__], "create_causal_mask"
    )


def packed_attention(
    module: nn.Module,
    query_1HNC: Tensor,
    key_1GNC: Tensor,
    value_1GNC: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: PackedRows | None = None,
    prompts: PromptRows | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample of a packed row, as transformers calls it.

    Args:
        module: The attention layer.
        query_1HNC: (1, H, N, C).
        key_1GNC: (1, G, N, C); G divides H.
        value_1GNC: (1, G, N, C).
        attention_mask: Must be None.
        packing: Where the samples are; the model hands it down from its forward.
        prompts: Keys and values of what `packing` left out, handed down likewise.
        scaling: Of the scores; 1 / √C when None.
        dropout: Must be 0.
        sliding_window: Must not be shorter than a sample.
        softcap: Must be None.
        **unused: What else a model hands to its attention function.

    Returns:
        (1, N, H, C), and no weights.

    Raises:
        ValueError: The model asks for what this function does not do.
    """
    del unused
    if packing is None or attention_mask is not None or dropout or softcap:
        raise ValueError(
            f"{type(module).__name__} cannot be packed: it hands its attention "
            f"{'no packing' if packing is None else 'packing'}, "
            f"{'no mask' if attention_mask is None else 'a mask'}, dropout {dropout} and softcap "
            f"{softcap}"
        )
    longest = packing.padded_shape[1]
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"a sample of {longest} tokens is longer than the sliding window of "
            f"{sliding_window}; lower max_seq_len"
        )
    layer: Any = module.layer_idx
    prompt_keys, prompt_values = (None, None) if prompts is None else prompts.of(layer)
    query_BTHC = packing.pad(query_1HNC[0].transpose(0, 1))
    key_BTGC = packing.pad(key_1GNC[0].transpose(0, 1), prompt_keys)
    value_BTGC = packing.pad(value_1GNC[0].transpose(0, 1), prompt_values)
    attend = _chosen or (
        attention_by_products if query_1HNC.device.type == "cpu" else fused_attention
    )
    scale = query_1HNC.shape[-1] ** -0.5 if scaling is None else scaling
    return packing.unpad(attend(query_BTHC, key_BTGC, value_BTGC, scale))[None], None


def fused_attention(
    query_BTHC: Tensor, key_BTGC: Tensor, value_BTGC: Tensor, scale: float
) -> Tensor:
    """Causal attention (B, T, H, C) by torch's fused kernels."""
    query, key, value = (x.transpose(1, 2) for x in (query_BTHC, key_BTGC, value_BTGC))
    return nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    ).transpose(1, 2)


def attention_by_products(
    query_BTHC: Tensor, key_BTGC: Tensor, value_BTGC: Tensor, scale: float
) -> Tensor:
    """The same by matrix products, the query heads of a key head stacked on each other.

    On a CPU torch has no kernel for grouped heads and copies keys and values for each query head.
    """
    B, T, H, C = query_BTHC.shape
    G, width = key_BTGC.shape[2], value_BTGC.shape[3]
    stacked = (query_BTHC * scale).view(B, T, G, H // G, C).permute(0, 2, 3, 1, 4)
    key, value = key_BTGC.permute(0, 2, 3, 1), value_BTGC.transpose(1, 2)
    scores = stacked.reshape(B * G, H // G * T, C) @ key.reshape(B * G, C, T)
    future = torch.full((T, T), float("-inf"), dtype=scores.dtype).triu(1)
    weights = torch.softmax(scores.view(B * G, H // G, T, T) + future, dim=-1)
    mixed = weights.view(B * G, H // G * T, T) @ value.reshape(B * G, T, width)
    return mixed.view(B, G, H // G, T, width).permute(0, 3, 1, 2, 4).reshape(B, T, H, width)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
