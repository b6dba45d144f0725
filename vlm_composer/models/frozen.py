"""What the frozen towers have in common."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class ArchitectureError(ValueError):
    """A model of this architecture cannot be a tower."""


class Frozen(nn.Module):
    """A module without gradients that stays in eval mode whatever its parent does."""

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Frozen:
        del mode
        super().train(False)
        return self


def decoder_of(model: PreTrainedModel) -> Any:
    """Return a causal language model without its head."""
    whole: Any = model
    # Gemma 3's and Llama 4's have another name than their classes say.
    return whole.get_decoder() if whole.base_model is whole else whole.base_model


def in_own_dtype(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off where the weights are stored in low precision already.

    Autocast would run the norms of a bf16 tower in fp32 and hand fp32 activations from layer to
    layer.
    """
    if weight.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, enabled=False)
