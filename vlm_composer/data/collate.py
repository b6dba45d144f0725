"""Samples to batches, and batches to micro-batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vlm_composer.data.schema import IMAGE_KEYS
from vlm_composer.models.packing import num_answer_tokens


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of B samples.

    Tokens are few and what packs them is arithmetic: they stay on the host, as arrays, which
    Composer leaves where they are. Only the images go to the device with the batch.

    Args:
        samples: As `SampleEncoder` returns them, in order.

    Returns:
        `ids` (B names), `pixel_values` uint8 (B, 3, S, S) or `patches` (B, N, V), `input_ids` and
        `labels` (B int64 arrays (T_i,) each), `num_cut` (B numbers of answer tokens that were cut).
    """
    return {
        "ids": [s["id"] for s in samples],
        **{key: _stack([s[key] for s in samples]) for key in IMAGE_KEYS if key in samples[0]},
        "input_ids": [s["input_ids"].numpy() for s in samples],
        "labels": [s["labels"].numpy() for s in samples],
        "num_cut": [s["num_cut"] for s in samples],
    }


def _stack(tensors: list[Tensor]) -> Tensor:
    """Stack tensors; a worker stacks where the process that trains can see it, as torch's own
    `default_collate` does, and spares a copy."""
    out = None
    if get_worker_info() is not None:
        shape = len(tensors), *tensors[0].shape
        storage = tensors[0]._typed_storage()._new_shared(math.prod(shape), device="cpu")
        out = tensors[0].new(storage).resize_(shape)
    return torch.stack(tensors, out=out)


def split_batch(batch: dict[str, Any], microbatch_size: int | float) -> list[dict[str, Any]]:
    """Cut a batch into micro-batches of at most `microbatch_size` samples."""
    size = int(microbatch_size)
    return [
        {key: value[start : start + size] for key, value in batch.items()}
        for start in range(0, len(batch["ids"]), size)
    ]


def num_samples(batch: dict[str, Any]) -> int:
    """Samples in a batch: what Composer counts a position in the epoch by."""
    return len(batch["ids"])


def num_tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Tokens in a batch and how many of them take a loss.

    Composer needs both under these names: given one number it would weigh by all tokens.
    """
    return {
        "total": sum(map(len, batch["input_ids"])),
        "loss_generating": num_answer_tokens(batch["labels"]),
    }
