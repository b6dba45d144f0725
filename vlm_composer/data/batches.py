"""Batches to micro-batches, and what is in them."""

from __future__ import annotations

from typing import Any

from vlm_composer.models.packing import num_answer_tokens


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
