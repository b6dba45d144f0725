"""Open images with Pillow and make them upright, RGB and square.

Everything that opens an image or makes RGB of it does it here: which formats are taken, how large
an image may be, and what grey levels, transparency and orientation mean is decided once.

An export holds a copy of this file: it imports numpy and PIL alone.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

FORMATS: tuple[str, ...] = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"),
    *(["AVIF"] if importlib.util.find_spec("PIL.AvifImagePlugin") else []),  # Pillow 11.3
)
"""Formats that are opened, whatever a file is called. Pillow knows fifty others, and starts outside
programs for some of them."""

MAX_PIXELS = 1 << 26
"""8192 × 8192: more, in a set of captioned images, is a decompression bomb (or 200 MB for one
sample)."""

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
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


class ImageTooLargeError(ValueError):
    """An image has more than `MAX_PIXELS` pixels."""


class GreyRangeError(ValueError):
    """An image has grey levels of which it is not known what is white."""


@contextmanager
def open_image(source: bytes | str | Path) -> Iterator[Image.Image]:
    """Open an image and read its header.

    Args:
        source: The file's bytes, or its path.

    Yields:
        The image, not decoded yet.

    Raises:
        OSError: It is not an image of one of `FORMATS` (PIL's UnidentifiedImageError), or the file
            cannot be read.
        ImageTooLargeError: It has more than `MAX_PIXELS` pixels.
    """
    try:
        opened = Image.open(
            BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
        )
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"over the limit of {MAX_PIXELS} pixels ({error})") from error
    with opened as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageTooLargeError(
                f"{width} × {height} is over the limit of {MAX_PIXELS} pixels; scale it down"
            )
        yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image; what is transparent becomes white.

    Dropping an alpha channel would show whatever colour lies under the transparent pixels, mostly
    black; Hugging Face's processors do that. Grey levels of more than 8 bits are scaled linearly,
    so that content of fewer bits in a wider file keeps its relative brightness:

    - Mode `I;16`, of any byte order: white is 65,535, or the largest level of the bits that a TIFF
      says it has.
    - Mode `I`: the same, where all levels lie in 0 … 65,535.
    - Mode `F`: white is 1, where all levels lie in 0 … 1.

    Raises:
        GreyRangeError: Levels of mode `I` or `F` lie elsewhere: what is white is not known.
    """
    _scale_transparency(image)
    image.load()
    info, deep = image.info, None  # `transpose` leaves `info` behind
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        deep = _eight_bits(image)
    method = _UPRIGHT.get(orientation(image))
    image = deep or image
    if method is not None:
        image = image.transpose(method)
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    transparent = deep is None and "transparency" in info
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or transparent:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def _scale_transparency(image: Image.Image) -> None:
    """Scale a PNG's transparent colour to 8 bits, as Pillow (11.3) does with the pixels alone."""
    colour, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or colour is None or not tiles:
        return
    match tiles[0].args:
        case "L;2":
            image.info["transparency"] = colour * 85
        case "L;4":
            image.info["transparency"] = colour * 17
        case "RGB;16B":
            image.info["transparency"] = tuple(level >> 8 for level in colour)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels of more than 8 bits by the rules of `to_rgb`."""
    levels = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    white: float = 65535
    if image.mode == "F":
        white = 1
    elif image.mode != "I" and tags:
        white = 2 ** min(16, *np.atleast_1d(tags.get(_TIFF_BITS, 16)).tolist()) - 1
    low, high = levels.min(), levels.max()
    if not (low >= 0 and high <= white):  # nor NaN
        raise GreyRangeError(
            f"grey levels of mode {image.mode} from {low} to {high}: white is not known outside "
            f"0 to {white:.0f}; save the image with 8 or 16 bits"
        )
    grey = np.rint(levels * (255 / white)).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits alone
        grey = 255 - grey
    found = Image.fromarray(grey)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = np.where(levels == transparent, 0, 255).astype(np.uint8)
        found.putalpha(Image.fromarray(alpha))
    return found


def scale_to_square(image: Image.Image, size: int, resample: int) -> npt.NDArray[np.uint8]:
    """Scale a whole image to a square; its aspect ratio is not kept, as in SigLIP's processor.

    Args:
        image: Of any mode.
        size: Side S in pixels.
        resample: PIL's filter.

    Returns:
        uint8 RGB (S, S, 3): the pixels of Hugging Face's PIL processors before they normalise.
    """
    return np.array(to_rgb(image).resize((size, size), resample=Image.Resampling(resample)))


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation (1 is upright), by PIL: it also looks into XMP."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # A broken tag makes PIL raise SyntaxError, ValueError, struct.error, … The image beside it
        # is whole, `convert` has taken it, and it stands as it is stored.
        return 1


def describe_error(error: BaseException) -> str:
    """Return what Pillow says is wrong, without the addresses of objects."""
    return _OBJECT.sub("the file", str(error)) or type(error).__name__
