"""Image bytes to uint8 pixels at the tower's size."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image; what is transparent becomes white.

    Dropping an alpha channel would show whatever colour lies under the transparent pixels, mostly
    black; Hugging Face's processors do that.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def decode_image(data: bytes, size: int, resample: int = Image.Resampling.BICUBIC) -> Tensor:
    """Decode an image and scale it to a square.

    The whole image is kept and its aspect ratio is not, as SigLIP's processor does it. Pixels equal
    those of Hugging Face's PIL processors before they normalise.

    Args:
        data: JPEG, PNG or whatever else PIL reads.
        size: Side S in pixels.
        resample: PIL's filter.

    Returns:
        uint8 RGB (3, S, S).

    Raises:
        ValueError: The bytes are not an image that PIL can read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = to_rgb(image).resize((size, size), resample=Image.Resampling(resample))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{len(data)} bytes that are not a readable image: {error}") from error
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def preprocessor_settings(
    preprocessor: dict[str, Any],
) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Read mean, standard deviation and filter out of a `preprocessor_config.json`.

    Args:
        preprocessor: Its contents.

    Returns:
        `image_mean` and `image_std` (three values each, for pixels in [0, 1]) and PIL's `resample`.
        What the file leaves out is what Hugging Face's SigLIP processor assumes: 0.5, 0.5, bicubic.
    """
    return (
        tuple(preprocessor.get("image_mean") or (0.5, 0.5, 0.5)),
        tuple(preprocessor.get("image_std") or (0.5, 0.5, 0.5)),
        int(preprocessor.get("resample", Image.Resampling.BICUBIC)),
    )
