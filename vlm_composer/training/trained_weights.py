"""The trained weights under every kind of parallelism: their names, and whole tensors of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def clean_name(name: str) -> str:
    """A parameter's name without what DDP and activation checkpointing add to it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def trained_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained weights of a Composer model with their names in a `VisionLanguageModel`, such as
    `connector.resampler.latents`."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield clean_name(name).removeprefix("model."), parameter


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def spread(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Give every rank its part of a tensor that rank 0 has; all ranks must call this.

    Args:
        tensor: The whole tensor, on rank 0.
        like: Whose device, dtype and sharding the result gets.

    Returns:
        The tensor, or this rank's shard of it.
    """
    full = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if dist.get_global_rank() == 0:
        assert tensor is not None
        full.copy_(tensor)
    dist.broadcast(full, src=0)
    if isinstance(like, DTensor):
        return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return full
