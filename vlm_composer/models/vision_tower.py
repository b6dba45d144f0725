"""The frozen vision tower: any Hugging Face vision transformer, for its patches.

It is kept free of what is never run: pooling heads, layers above the chosen one. `tower_loading`
makes the models that it takes.

Shape suffixes: B images, S image side, N patches, V vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm_composer.models.frozen import Frozen, in_own_dtype
from vlm_composer.models.vision_layers import drop_pooling, keep_layers, read_patches


class VisionTower(Frozen):
    """Patches of one layer of a frozen vision transformer.

    Args:
        model: A Hugging Face vision model whose forward takes `pixel_values` (B, 3, S, S).
        layer: Whose output to take. -1 is the model's last hidden state, after its final norm. Any
            other index is that of Hugging Face's `hidden_states` (0 the embeddings, k the output of
            the k-th layer, negative from the end, so -2 is the last layer but one), before the
            final norm, as LLaVA's `vision_feature_layer`. Layers above it are removed.
        image_size: Side S in pixels; None takes the model's own.
        image_mean: Mean of each channel, for pixels in [0, 1].
        image_std: Standard deviation of each channel, for pixels in [0, 1].

    Raises:
        ValueError: The layer does not exist, or the model has no stack of layers or final norm that
            could be cut.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layer: int = -1,
        image_size: int | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.model: Any = model  # torch types every attribute of a module as a tensor or a module
        config = model.config
        self.image_size: int = image_size or config.image_size
        if self.image_size < config.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is less than one patch of {config.patch_size} "
                "pixels; set a multiple of it"
            )
        self.num_patches: int = (self.image_size // config.patch_size) ** 2
        self.hidden_size: int = config.hidden_size
        drop_pooling(model)
        keep_layers(model, layer)
        # fp32 whatever the tower's dtype: pixels are normalised before they are cast.
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)
        self.freeze()

    def forward(self, pixel_values_B3SS: Tensor) -> Tensor:
        """Return patches (B, N, V) of uint8 RGB pixels (B, 3, S, S), in the tower's dtype.

        Raises:
            ValueError: The images are not of the tower's size, or the model gives fewer tokens than
                the image has patches.
        """
        if pixel_values_B3SS.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values_B3SS.shape)}: this tower takes "
                f"(B, 3, {self.image_size}, {self.image_size})"
            )
        with torch.inference_mode():
            patches_BNV = self._patches(pixel_values_B3SS)
        return patches_BNV.clone()  # autograd takes no tensor of inference mode

    def _patches(self, pixel_values_B3SS: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        normalised = (pixel_values_B3SS.float() / 255 - self.image_mean) / self.image_std
        with in_own_dtype(weight):
            return read_patches(self.model, normalised.to(weight.dtype))
