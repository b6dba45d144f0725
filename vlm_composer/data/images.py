"""Image bytes to uint8 pixels at the tower's size."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from vlm_composer.config.data import ImageDecoder
from vlm_composer.images.pil import (
    describe_error,
    open_image,
    orientation,
    scale_to_square,
    to_rgb,
)

log = logging.getLogger(__name__)

TORCH_FILTERS = {
    Image.Resampling.BILINEAR: torch.ops.aten._upsample_bilinear2d_aa.out,
    Image.Resampling.BICUBIC: torch.ops.aten._upsample_bicubic2d_aa.out,
}
"""PIL's filters that torch has too: what `interpolate(…, antialias=True)` calls, for it takes no
`out`."""


def decode_image(
    data: bytes,
    size: int,
    resample: int = Image.Resampling.BICUBIC,
    decoder: ImageDecoder = "torchvision",
    out: Tensor | None = None,
) -> Tensor:
    """Decode an image and scale it to a square.

    The whole image is kept and its aspect ratio is not, as SigLIP's processor does it.

    `pil`: the pixels are those of Hugging Face's PIL processors before they normalise.

    `torchvision`: torchvision decodes upright JPEGs, grey or in colour, to the same bits as PIL,
    and PIL everything else: rotated and CMYK JPEGs, PNG, WebP, GIF, … That is decided by the header
    and not by trial; only a JPEG that torchvision refuses is PIL's to refuse or to read, so that
    the same files are images with both. torch scales what was decoded, with weights of 16 bits:
    within 2 grey levels of PIL, 0.01 on average. All in all a core makes 2.2 to 2.4 times as many
    images of 384 × 384 as with `pil` (406 against 177 a second from JPEGs of 640 × 480, 114 kB).
    A filter that torch does not have is PIL's, and so is then everything.

    Args:
        data: A file of one of `pil.FORMATS`.
        size: Side S in pixels.
        resample: PIL's filter.
        decoder: Who decodes and scales.
        out: Contiguous uint8 (3, S, S) to write to, an image's place in a batch.

    Returns:
        uint8 RGB (3, S, S): `out`, where it is given.

    Raises:
        ValueError: The bytes are not an image of those formats, or too many pixels, or grey levels
            without a known white.
    """
    scale = TORCH_FILTERS.get(Image.Resampling(resample)) if decoder == "torchvision" else None
    try:
        with open_image(data) as image:
            if scale is None:
                scaled = _channels_first(scale_to_square(image, size, resample))
                return scaled.contiguous() if out is None else out.copy_(scaled)
            pixels = _decode_jpeg(data) if _is_torchvisions(image) else None
            if pixels is None:
                pixels = _channels_first(np.array(to_rgb(image)))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{len(data)} bytes that are not a readable image: {describe_error(error)}"
        ) from error
    if out is None:
        out = torch.empty(3, size, size, dtype=torch.uint8)
    scale(pixels[None], (size, size), False, None, None, out=out[None])
    return out


def _channels_first(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """View RGB (H, W, 3) as (3, H, W)."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _is_torchvisions(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L") and orientation(image) == 1


def _decode_jpeg(data: bytes) -> Tensor | None:
    """Decode a JPEG to RGB (3, H, W); None where torchvision refuses."""
    try:
        # A bytearray, because torch warns of memory that it may not write to.
        return decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
        )
    except RuntimeError as error:
        log.debug("torchvision refuses a JPEG of %d bytes; PIL decides: %s", len(data), error)
        return None


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
