"""What is accepted as an image, and that nothing else gets through or crashes the check."""

import struct
import zlib
from contextlib import suppress
from io import BytesIO
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from convert.errors import Reason, Rejected
from convert.images import check_image
from vlm_composer.images.pil import MAX_PIXELS, to_rgb

pytestmark = [
    pytest.mark.filterwarnings("ignore:Corrupt EXIF data"),
    pytest.mark.filterwarnings("ignore:Truncated File Read"),
]
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
        pytest.param(encoded(GRADIENT, "SGI"), Reason.NOT_AN_IMAGE, id="sgi"),
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


@pytest.mark.parametrize("side", [9_000, 10_000, 60_000])  # Pillow passes, warns and raises
def test_too_many_pixels_are_told_with_the_limit(side: int) -> None:
    with pytest.raises(Rejected, match=f"over the limit of {MAX_PIXELS} pixels"):
        check_image(png_header_of(side, side))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535, b"bad"])
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


def colourful(width: int, height: int) -> Image.Image:
    """A picture with detail in all three channels."""
    pixels = (bytes((31 * x % 256, 17 * x * y % 256, 7 * y % 256)) for y in range(height)
              for x in range(width))  # fmt: skip
    return Image.frombytes("RGB", (width, height), b"".join(pixels))


JPEGS = {
    "4:4:4": encoded(colourful(24, 17), "JPEG", subsampling=0),
    "4:2:2": encoded(colourful(24, 17), "JPEG", subsampling=1, optimize=True),
    "4:2:0": encoded(colourful(17, 24), "JPEG", subsampling=2, quality=30),
    "progressive": encoded(colourful(24, 17), "JPEG", subsampling=2, progressive=True),
    "restarts": encoded(colourful(24, 17), "JPEG", restart_marker_blocks=1),
    "grey": encoded(colourful(24, 17).convert("L"), "JPEG"),
    "grey-progressive": encoded(colourful(9, 20).convert("L"), "JPEG", progressive=True),
    "tiny": encoded(colourful(3, 2), "JPEG"),
    "exif": encoded(colourful(24, 17), "JPEG", exif=ROTATED),
}


def decodes_in_full(data: bytes) -> bool:
    """What training's decoder makes of it: every pixel, without a look at `check_image`."""
    try:
        with Image.open(BytesIO(data)) as image:
            return image.format == "JPEG" and bool(image.convert("RGB").tobytes())
    except Exception:  # of Pillow's decoders: OSError, SyntaxError, …
        return False


def assert_same_verdict(data: bytes) -> bool:
    """Whether `check_image` takes it."""
    try:
        check_image(data)
        taken = True
    except Rejected as rejected:
        if rejected.reason is Reason.BAD_DIMENSIONS:  # nothing was decoded
            return False
        taken = False
    assert taken == decodes_in_full(data), data.hex()
    return taken


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_cut_anywhere_is_taken_just_where_it_decodes_in_full(name: str) -> None:
    jpeg = JPEGS[name]
    taken = [assert_same_verdict(jpeg[:cut]) for cut in range(len(jpeg) + 1)]
    assert taken[-1]
    assert not any(taken[:-2])  # libjpeg does without the last byte, half of the end's marker


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_with_a_marker_anywhere_is_taken_just_where_it_decodes_in_full(name: str) -> None:
    jpeg = JPEGS[name]
    for marker in (0xC2, 0xC4, 0xD3, 0xD9, 0xDA, 0xDB):
        for place in range(len(jpeg) - 1):
            assert_same_verdict(jpeg[:place] + bytes((0xFF, marker)) + jpeg[place + 2 :])


@pytest.mark.parametrize("name", ["4:4:4", "4:2:0", "progressive"])
def test_a_jpeg_of_any_sampling_is_taken_just_where_it_decodes_in_full(name: str) -> None:
    jpeg = bytearray(JPEGS[name])
    frame = jpeg.index(b"\xff\xc2" if name == "progressive" else b"\xff\xc0")
    factors = [16 * across + down for across in range(1, 5) for down in range(1, 5)]
    taken = 0
    for luma, blue in product(factors, factors):
        for red in {0x11, 0x21, blue}:
            jpeg[frame + 11], jpeg[frame + 14], jpeg[frame + 17] = luma, blue, red
            taken += assert_same_verdict(bytes(jpeg))
    assert 50 < taken < 500


@settings(steady, max_examples=500)
@given(
    jpeg=st.sampled_from(list(JPEGS.values())),
    cut=st.integers(0, 40),
    damage=st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=4)), max_size=5),
    removed=st.tuples(st.integers(0, 3000), st.integers(0, 60)),
)
def test_a_damaged_jpeg_is_taken_just_where_it_decodes_in_full(
    jpeg: bytes, cut: int, damage: list[tuple[int, bytes]], removed: tuple[int, int]
) -> None:
    data = bytearray(jpeg[: len(jpeg) - cut])
    for place, what in damage:
        data[place % len(data) : place % len(data) + len(what)] = what
    del data[removed[0] : sum(removed)]
    assert_same_verdict(bytes(data))
