"""Pictures as PIL opens them to pixels: upright, RGB, square.

An export holds a copy of this file: it imports torch, numpy and PIL alone.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation → what sets an image upright."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image; what is transparent becomes white.

    Dropping an alpha channel would show whatever colour lies under the transparent pixels, mostly
    black; Hugging Face's processors do that.
    """
    image.load()
    method = _UPRIGHT.get(orientation(image))
    info = image.info  # `transpose` leaves it behind
    if method is not None:
        image = image.transpose(method)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def scale_to_square(image: Image.Image, size: int, resample: int) -> Tensor:
    """Scale a whole image to a square; its aspect ratio is not kept, as in SigLIP's processor.

    Args:
        image: Of any mode.
        size: Side S in pixels.
        resample: PIL's filter.

    Returns:
        uint8 RGB (3, S, S): the pixels of Hugging Face's PIL processors before they normalise.
    """
    scaled = to_rgb(image).resize((size, size), resample=Image.Resampling(resample))
    return to_tensor(scaled).contiguous()


def orientation(image: Image.Image) -> int:
    """EXIF's orientation (1 is upright), by PIL: it also looks into XMP."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # A broken tag makes PIL raise SyntaxError, ValueError, struct.error, … The picture beside
        # it is whole, `convert` has taken it, and it stands as it is stored.
        return 1


def to_tensor(image: Image.Image) -> Tensor:
    """View RGB as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
