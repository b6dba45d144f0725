"""Decodes every image once, here, so that training never meets one that it cannot decode.

What is wrong with a JPEG is found where its bits are read, not where pixels are computed of them.
So it is read to its end, every coefficient of it, at an eighth of its size (libjpeg's scaled
decoding): the same are taken and the same rejected as by decoding it in full, in half the time.
"""

import warnings

from PIL import UnidentifiedImageError

from convert.errors import Reason, Rejected
from vlm_composer.images.pil import (
    GreyRangeError,
    ImageTooLargeError,
    describe_error,
    open_image,
    orientation,
    to_rgb,
)

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
        Rejected: If it is not an image of one of `pil.FORMATS`, its dimensions are absurd, or it
            cannot be decoded to the end and converted to RGB.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken tags, say
            with open_image(data) as image:
                width, height = image.size
                _check_dimensions(width, height)
                if image.format == "JPEG" and image.mode in ("RGB", "L"):
                    image.draft(None, (1, 1))  # the smallest scale that libjpeg has
                image.load()  # decodes; an animation gives its first frame
                if image.mode not in ("RGB", "L"):  # of these no conversion fails
                    to_rgb(image)
                return (height, width) if orientation(image) in (5, 6, 7, 8) else (width, height)
    except Rejected:
        raise
    except ImageTooLargeError as error:
        raise Rejected(Reason.BAD_DIMENSIONS, str(error)) from error
    except GreyRangeError as error:
        raise Rejected(Reason.UNKNOWN_GREY_RANGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise Rejected(
            Reason.NOT_AN_IMAGE, f"{len(data)} bytes that start with {data[:8]!r}"
        ) from error
    except Exception as error:
        # Bad data makes Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error,
        # IndexError, zlib.error, … None of them is worth stopping a run of 558,128 images.
        text = f"{type(error).__name__}: {describe_error(error)}"
        raise Rejected(Reason.BROKEN_IMAGE, text) from error


def _check_dimensions(width: int, height: int) -> None:
    short, long = min(width, height), max(width, height)
    if short < MIN_SIDE or long > MAX_ASPECT * short:
        raise Rejected(
            Reason.BAD_DIMENSIONS,
            f"{width} × {height}: both sides must be at least {MIN_SIDE} pixels, and the long one "
            f"at most {MAX_ASPECT} times the short one",
        )
