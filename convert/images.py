"""Decodes every image once, here, so that training never meets one that it cannot decode.

What is wrong with a JPEG is found where its bits are read, not where pixels are computed of them.
So it is read to its end, every coefficient of it, at an eighth of its size (libjpeg's scaled
decoding): the same are taken and the same rejected as by decoding it in full, in half the time.
"""

import warnings
from io import BytesIO

from PIL import ExifTags, Image, UnidentifiedImageError

from convert.errors import Reason, Rejected

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is taken for an image. Pillow opens fifty others, some through outside programs."""

MAX_PIXELS = 1 << 26
"""8192 × 8192: more, in a file of captions, is a decompression bomb (or 200 MB for one sample)."""

MIN_SIDE = 2
"""Pixels. An image one pixel wide or high is a tracking pixel or a rule, not a picture."""

MAX_ASPECT = 100
"""Long side over short side."""


def check_image(data: bytes) -> tuple[int, int]:
    """Decodes an image to its end, after a look at its header for absurd dimensions.

    Args:
        data: The file's bytes.

    Returns:
        (width, height) in pixels, as the image is shown: the bytes stay as they are, and training
        sets upright what EXIF says is not.

    Raises:
        Rejected: If it is not an image of one of `FORMATS`, its dimensions are absurd, or it
            cannot be decoded to the end and converted to RGB.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=FORMATS) as image:  # reads the header only
                width, height = image.size
                _check_dimensions(width, height)
                if image.format == "JPEG" and image.mode in ("RGB", "L"):
                    image.draft(None, (1, 1))  # the smallest scale that libjpeg has
                image.load()  # decodes; an animation gives its first frame
                if image.mode != "RGB":  # else it would only be copied
                    image.convert("RGB")
                return (height, width) if _lies_on_its_side(image) else (width, height)
    except Rejected:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Rejected(
            Reason.BAD_DIMENSIONS, f"over the limit of {MAX_PIXELS} pixels (Pillow: {error})"
        ) from error
    except UnidentifiedImageError as error:
        raise Rejected(
            Reason.NOT_AN_IMAGE, f"{len(data)} bytes that start with {data[:8]!r}"
        ) from error
    except Exception as error:
        # Bad data makes Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error,
        # IndexError, zlib.error, … None of them is worth stopping a run of 558,128 images.
        raise Rejected(Reason.BROKEN_IMAGE, f"{type(error).__name__}: {error}") from error


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether EXIF says so. As in training, a tag that cannot be read says nothing."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # SyntaxError, ValueError, struct.error, …
        return False


def _check_dimensions(width: int, height: int) -> None:
    short, long = min(width, height), max(width, height)
    if width * height > MAX_PIXELS:
        raise Rejected(
            Reason.BAD_DIMENSIONS, f"{width} × {height} is over the limit of {MAX_PIXELS} pixels"
        )
    if short < MIN_SIDE or long > MAX_ASPECT * short:
        raise Rejected(
            Reason.BAD_DIMENSIONS,
            f"{width} × {height}: both sides must be at least {MIN_SIDE} pixels, and the long one "
            f"at most {MAX_ASPECT} times the short one",
        )
