"""Samples to batches, and batches to micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_composer.models.vlm import IGNORE_INDEX

ROW_TENSORS = ("input_ids", "attention_mask", "labels")
"""Tensors of a batch with a column a token (B, T)."""


class Collator:
    """Stacks encoded samples, padding their tokens on the right.

    Args:
        pad_token_id: Id that fills a row; it meets neither loss nor attention.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of B samples.

        Args:
            samples: As `SampleEncoder` returns them, in order.

        Returns:
            `ids` (B names), `pixel_values` uint8 (B, 3, S, S), `input_ids`, `attention_mask` and
            `labels` (B, T) int64, `num_cut` (B,) answer tokens that were cut.
        """
        lengths = torch.tensor([len(s["input_ids"]) for s in samples])
        input_ids = [s["input_ids"] for s in samples]
        labels = [s["labels"] for s in samples]
        return {
            "ids": [s["id"] for s in samples],
            "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "num_cut": torch.tensor([s["num_cut"] for s in samples]),
        }


def split_batch(batch: dict[str, Any], microbatch_size: int | float) -> list[dict[str, Any]]:
    """Cut a batch into micro-batches of at most `microbatch_size` samples, each as wide as its
    longest."""
    size = int(microbatch_size)
    microbatches = []
    for start in range(0, len(batch["ids"]), size):
        part = {key: value[start : start + size] for key, value in batch.items()}
        width = int(part["attention_mask"].sum(dim=1).max())
        microbatches.append(part | {key: part[key][:, :width] for key in ROW_TENSORS})
    return microbatches


def num_samples(batch: dict[str, Any]) -> int:
    """Samples in a batch: what Composer counts a position in the epoch by."""
    return len(batch["ids"])


def num_tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Tokens in a batch, padding left out, and how many of them take a loss.

    Composer needs both under these names: given one number it would weigh by all tokens.
    """
    return {
        "total": int(batch["attention_mask"].sum()),
        "loss_generating": int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
    }
