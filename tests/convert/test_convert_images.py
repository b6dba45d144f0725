"""What is accepted as an image, and that nothing else gets through or crashes the check."""

import struct
import zlib
from contextlib import suppress
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from convert.errors import Reason, Rejected
from convert.images import check_image
from vlm_composer.data.pictures import to_rgb

steady = settings(deadline=None, derandomize=True, database=None)


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


GRADIENT = Image.linear_gradient("L").resize((48, 32))
JPEG = encoded(GRADIENT.convert("RGB"), "JPEG")
PNG = encoded(GRADIENT.convert("RGB"), "PNG")


def png_header_of(width: int, height: int) -> bytes:
    """A small PNG that claims to be of other dimensions."""
    chunk = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + PNG[33:]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(JPEG, id="jpeg"),
        pytest.param(encoded(GRADIENT, "JPEG", progressive=True), id="grey-progressive"),
        pytest.param(encoded(GRADIENT.convert("CMYK"), "JPEG"), id="cmyk"),
        pytest.param(PNG, id="png"),
        pytest.param(encoded(GRADIENT.convert("RGBA"), "PNG"), id="rgba"),
        pytest.param(encoded(GRADIENT.convert("P"), "PNG", transparency=b"\0\1"), id="palette"),
        pytest.param(encoded(GRADIENT.convert("I;16"), "PNG"), id="16-bit"),
        pytest.param(encoded(GRADIENT.convert("1"), "PNG"), id="bilevel"),
        pytest.param(encoded(GRADIENT, "GIF"), id="gif"),
        pytest.param(
            encoded(GRADIENT, "GIF", save_all=True, append_images=[GRADIENT]), id="moving"
        ),
        pytest.param(encoded(GRADIENT, "WEBP"), id="webp"),
        pytest.param(
            encoded(GRADIENT, "WEBP", save_all=True, append_images=[GRADIENT] * 3),
            id="moving-webp",
        ),
        pytest.param(
            encoded(GRADIENT, "PNG", save_all=True, append_images=[GRADIENT.rotate(90)]),
            id="moving-png",
        ),
        pytest.param(encoded(GRADIENT, "BMP"), id="bmp"),
        pytest.param(JPEG + b"trailing bytes", id="trailing"),
    ],
)
def test_accepted(data: bytes) -> None:
    assert check_image(data) == (48, 32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", Reason.NOT_AN_IMAGE, id="empty"),
        pytest.param(b"<html>404 Not Found</html>", Reason.NOT_AN_IMAGE, id="html"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", Reason.NOT_AN_IMAGE, id="postscript"),
        pytest.param(encoded(GRADIENT, "TIFF"), Reason.NOT_AN_IMAGE, id="tiff"),
        pytest.param(JPEG[: len(JPEG) // 2], Reason.BROKEN_IMAGE, id="half-jpeg"),
        pytest.param(PNG[: len(PNG) // 2], Reason.BROKEN_IMAGE, id="half-png"),
        pytest.param(PNG[:60] + b"\xff" * 8 + PNG[68:], Reason.BROKEN_IMAGE, id="damaged-png"),
        pytest.param(
            encoded(Image.new("1", (9000, 9000)), "PNG"), Reason.BAD_DIMENSIONS, id="bomb"
        ),
        pytest.param(png_header_of(10_000, 10_000), Reason.BAD_DIMENSIONS, id="pillow-warns"),
        pytest.param(png_header_of(60_000, 60_000), Reason.BAD_DIMENSIONS, id="pillow-raises"),
        pytest.param(encoded(Image.new("L", (1, 1)), "GIF"), Reason.BAD_DIMENSIONS, id="pixel"),
        pytest.param(encoded(Image.new("L", (50, 1)), "PNG"), Reason.BAD_DIMENSIONS, id="rule"),
        pytest.param(encoded(Image.new("L", (2, 201)), "PNG"), Reason.BAD_DIMENSIONS, id="strip"),
    ],
)
def test_rejected(data: bytes, reason: Reason) -> None:
    with pytest.raises(Rejected) as rejected:
        check_image(data)
    assert rejected.value.reason is reason


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535, b"bad"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_image_is_as_large_as_training_shows_it(form: str, orientation: object) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    raw = exif.tobytes() if orientation != b"bad" else b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
    data = encoded(GRADIENT.convert("RGB"), form, exif=raw)
    with Image.open(BytesIO(data)) as image:
        assert check_image(data) == to_rgb(image).size
    assert check_image(data) == ((32, 48) if orientation in (5, 6, 7, 8) else (48, 32))


GIF, WEBP, BMP = (encoded(GRADIENT, form) for form in ("GIF", "WEBP", "BMP"))
ROTATED = Image.Exif()
ROTATED[ExifTags.Base.Orientation] = 6
TURNED = encoded(GRADIENT.convert("RGB"), "JPEG", exif=ROTATED)


@steady
@given(
    original=st.sampled_from([JPEG, PNG, GIF, WEBP, BMP, TURNED]),
    cut=st.integers(0, 2000),
    damage=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
)
def test_damaged_files_are_accepted_or_rejected_but_never_crash(
    original: bytes, cut: int, damage: list[tuple[int, int]]
) -> None:
    data = bytearray(original[: max(cut, 1)])
    for place, value in damage:
        data[place % len(data)] = value
    with suppress(Rejected):
        check_image(bytes(data))
