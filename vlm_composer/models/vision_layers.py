"""What is cut from a Hugging Face vision transformer, and how its patches are read.

Shape suffixes: B images, S image side, N patches, V vision width. An export holds a copy of this
file: it imports torch and transformers alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class PatchesError(ValueError):
    """A vision model does not give a token for each patch of its images."""


def read_patches(model: PreTrainedModel, pixel_values_B3SS: Tensor) -> Tensor:
    """Return the patches (B, N, V) of normalised pixels (B, 3, S, S) in the model's dtype.

    Raises:
        PatchesError: The model gives fewer tokens than the image has patches.
    """
    config: Any = model.config
    side = pixel_values_B3SS.shape[-1]
    num_patches = (side // config.patch_size) ** 2
    # DINOv2 always interpolates its positions to the image; SigLIP, CLIP and ViT must be asked to.
    must_ask = side != config.image_size and not config.model_type.startswith("dinov2")
    resize = {"interpolate_pos_encoding": True} if must_ask else {}
    hidden = model(pixel_values_B3SS, **resize).last_hidden_state
    num_prefix = hidden.shape[1] - num_patches  # class and register tokens come first
    if num_prefix < 0:
        raise PatchesError(f"it gave {hidden.shape[1]} tokens for {num_patches} patches")
    return hidden[:, num_prefix:]


def layers_below(layer: int, depth: int) -> int:
    """Layers that make the hidden state `layer`, an index as `VisionTower`'s, of a model of
    `depth` layers.

    Raises:
        ValueError: There is no such hidden state.
    """
    count = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= count <= depth:
        raise ValueError(
            f"layer {layer}: a model of {depth} layers has hidden states {-depth - 1} to {depth}"
        )
    return count


def drop_pooling(model: nn.Module) -> None:
    """Remove the head of SigLIP or the pooler of ViT, which make one vector of the patches."""
    module: Any
    for module in list(model.modules()):
        if getattr(module, "use_head", False):
            module.use_head = False
            del module.head
        if isinstance(getattr(module, "pooler", None), nn.Module):
            module.pooler = None


def keep_layers(model: PreTrainedModel, layer: int) -> None:
    """Cut the stack so that `last_hidden_state` is `hidden_states[layer]` of the whole model.

    Args:
        model: A Hugging Face vision model.
        layer: As `VisionTower`'s; -1 leaves the model as it is.

    Raises:
        ValueError: There is no such layer, or the model has no stack of layers or final norm that
            could be cut.
    """
    if layer == -1:
        return
    depth: int = model.config.num_hidden_layers
    keep = layers_below(layer, depth)
    stacks = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    norms = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if name in ("post_layernorm", "layernorm")
        and any(n == "encoder" for n, _ in module.named_children())
    ]
    if len(stacks) != 1 or len(norms) != 1:
        raise ValueError(
            f"layer {layer}: cannot cut {type(model).__name__}: found {len(stacks)} stacks of "
            f"{depth} layers and {len(norms)} final norms, need one of each; use layer -1"
        )
    (parent, name), (norm_parent, norm_name) = stacks[0], norms[0]
    setattr(parent, name, getattr(parent, name)[:keep])
    setattr(norm_parent, norm_name, nn.Identity())
    model.config.num_hidden_layers = keep
