"""Pictures to normalised pixels, as the training data was read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from vlm_composer.images.pil import open_image, scale_to_square


class VLMComposerImageProcessor(BaseImageProcessor):
    """Set a picture upright, lay it on white, scale it to a square with PIL, normalise it.

    Args:
        size: `height` and `width`, which are equal, in pixels.
        image_mean: Of each channel, for pixels in [0, 1].
        image_std: Of each channel, for pixels in [0, 1].
        resample: PIL's filter.
        **kwargs: transformers' own.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        resample: int = Image.Resampling.BICUBIC,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = size or {"height": 384, "width": 384}
        self.image_mean = image_mean or [0.5, 0.5, 0.5]
        self.image_std = image_std or [0.5, 0.5, 0.5]
        self.resample = int(resample)

    def preprocess(  # type: ignore[override]
        self, images: Any, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Make pixels of pictures.

        Args:
            images: A PIL image, or a uint8 array (H, W, 3), or a path; or several.
            return_tensors: As transformers'; "pt" when None.
            **kwargs: None is known.

        Returns:
            `pixel_values` (B, 3, S, S), fp32.

        Raises:
            ValueError: A keyword is not known, or something is no picture.
            OSError: A file cannot be read.
        """
        if unknown := {key for key, value in kwargs.items() if value is not None}:
            raise ValueError(f"{sorted(unknown)}: pictures are read as in training, or not at all")
        several = images if isinstance(images, list | tuple) else [images]
        pixels = torch.stack([self.pixels_of(image) for image in several])
        return BatchFeature(
            {"pixel_values": self.normalise_pixels(pixels)}, tensor_type=return_tensors or "pt"
        )

    def pixels_of(self, image: Any) -> Tensor:
        """Return the uint8 pixels (3, S, S) of a picture."""
        if isinstance(image, list | tuple) and len(image) == 1:
            (image,) = image
        if isinstance(image, str):
            with open_image(image) as opened:
                return self.pixels_of(opened)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise ValueError(f"{type(image).__name__}: give PIL images, uint8 arrays or paths")
        pixels = scale_to_square(image, self.size["height"], self.resample)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def normalise_pixels(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 pixels (B, 3, S, S) in fp32."""
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (self.image_mean, self.image_std))
        return (pixels.float() / 255 - mean) / std
