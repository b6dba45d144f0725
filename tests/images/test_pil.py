"""Every mode and format that Pillow gives becomes upright RGB by one rule, wherever it is read."""

import ast
import io
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import convert
import vlm_composer
from convert.errors import Reason, Rejected
from convert.images import check_image
from vlm_composer.data.images import decode_image
from vlm_composer.export.pictures_at import Picture
from vlm_composer.export.remote_code.image_processing_vlm_composer import VLMComposerImageProcessor
from vlm_composer.images.pil import (
    MAX_PIXELS,
    GreyRangeError,
    ImageTooLargeError,
    describe_error,
    open_image,
    to_rgb,
)

SIDE = 16
RAMP = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgb(data):
    with open_image(data) as image:
        return np.array(to_rgb(image))


def tiff(levels, *, bits=16, kind=1, photometric=1, order="<"):
    """A TIFF of one strip, as no writer of Pillow makes it."""
    data = levels.tobytes()
    entries = [
        (256, 4, levels.shape[1] if bits != 12 else SIDE),
        *((257, 4, levels.shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, photometric)),
        *((273, 4, 8), (277, 3, 1), (278, 4, levels.shape[0]), (279, 4, len(data)), (339, 3, kind)),
    ]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, form, value in entries:
        packed = struct.pack(f"{order}{'H2x' if form == 3 else 'I'}", value)
        directory += struct.pack(f"{order}HHI", tag, form, 1) + packed
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + directory + bytes(4)


DEEP = {
    "png": encode(Image.fromarray(RAMP)),
    "tiff": encode(Image.fromarray(RAMP), "TIFF"),
    "tiff, compressed": encode(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "tiff, big-endian": tiff(RAMP.astype(">u2"), order=">"),
    "tiff, white is zero": tiff(65535 - RAMP, photometric=0),
    "tiff, 32 bits": tiff(RAMP.astype("<u4"), bits=32),
    "tiff, signed": tiff((RAMP >> 1).astype("<i2"), kind=2),
    "tiff, floats": tiff((RAMP / 65535).astype("<f4"), bits=32, kind=3),
    "tiff, floats, white is zero": tiff(
        (1 - RAMP / 65535).astype("<f4"), bits=32, kind=3, photometric=0
    ),
    "pgm": b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes(),
    "jpeg 2000": encode(Image.fromarray(RAMP), "JPEG2000"),
}


@pytest.mark.parametrize("name", DEEP)
def test_grey_levels_of_more_than_8_bits_keep_their_brightness(name):
    expected = RAMP / 257 / (2 if name == "tiff, signed" else 1)
    found = rgb(DEEP[name])
    assert found.shape == (SIDE, SIDE, 3)
    assert np.abs(found - expected[..., None]).max() <= 1
    assert check_image(DEEP[name]) == (SIDE, SIDE)


def test_the_examples_mean_is_that_of_the_same_image_with_8_bits():
    eight = encode(Image.fromarray((RAMP >> 8).astype(np.uint8)))
    assert rgb(DEEP["png"]).mean() == pytest.approx(127.5, abs=0.5)
    assert rgb(DEEP["png"]).mean() == pytest.approx(rgb(eight).mean(), abs=0.5)


@pytest.mark.parametrize("order", ["<", ">"])
def test_12_bits_in_16_keep_their_relative_brightness(order):
    scene = RAMP >> 4  # 0 … 4095
    found = rgb(encode(Image.fromarray(scene)))
    assert found.max() == 16
    assert np.abs(found[..., 0] - scene / 257).max() <= 0.5
    pairs = scene.reshape(-1, 2)
    packed = np.empty((len(pairs), 3), np.uint8)  # three bytes hold two levels
    packed[:, 0], packed[:, 1] = pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8
    packed[:, 2] = pairs[:, 1] & 255
    if order == "<":  # a TIFF of 12 bits says so: its white is 4095
        found = rgb(tiff(packed.reshape(SIDE, -1), bits=12))
        assert np.abs(found[..., 0] - scene / 4095 * 255).max() <= 0.5


@pytest.mark.parametrize("level", [0, 300, 65535])
def test_a_transparent_level_becomes_white_and_no_other_does(level):
    levels = np.full((SIDE, SIDE), 25700, np.uint16)
    levels[0] = level
    levels[1] = min(level + 1, 65534)  # in 8 bits the same
    found = rgb(encode(Image.fromarray(levels), transparency=level))
    assert (found[0] == 255).all()
    assert (found[1] == round(min(level + 1, 65534) / 257)).all()
    assert (found[2:] == 100).all()


def png(depth, channels, rows, transparent):
    """A PNG of a kind that Pillow does not write."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, 2 * (channels == 3), 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize(
    ("depth", "channels"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)]
)
def test_a_transparent_colour_of_any_depth_becomes_white_and_no_other_does(depth, channels):
    most = 2**depth - 1
    values = [round(share**1.5 * most) for share in np.linspace(0, 1, SIDE)]
    bits = "".join(f"{value:0{depth}b}" * channels for value in values)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    for key in sorted({values[0], values[5], values[-1]}):
        data = png(depth, channels, [row] * SIDE, struct.pack(">H", key) * channels)
        found = rgb(data).astype(float)
        expected = np.array([255 if value == key else 255 * value / most for value in values])
        assert np.abs(found - expected[:, None]).max() <= 1.001
        check_image(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["I;16", "F", "L"])
def test_deep_images_are_set_upright(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = (RAMP >> 8).astype(np.uint8)
    levels = {"I;16": grey.astype(np.uint16) * 257, "F": np.float32(grey / 255), "L": grey}[mode]
    image = Image.fromarray(levels)
    upright = Image.fromarray(grey)
    upright.getexif()[0x0112] = orientation
    expected = np.array(ImageOps.exif_transpose(upright))
    data = encode(image, "TIFF" if mode == "F" else "PNG", exif=exif)
    assert np.abs(rgb(data)[..., 0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("levels", "found"),
    [
        (tiff(np.full((SIDE, SIDE), 65536, "<u4"), bits=32), "mode I from 65536 to 65536"),
        (tiff(np.full((SIDE, SIDE), -1, "<i4"), bits=32, kind=2), "mode I from -1 to -1"),
        (tiff(np.full((SIDE, SIDE), 255, "<f4"), bits=32, kind=3), "mode F from 255.0 to 255.0"),
        (tiff(np.full((SIDE, SIDE), -0.5, "<f4"), bits=32, kind=3), "mode F from -0.5 to -0.5"),
        (tiff(np.full((SIDE, SIDE), np.nan, "<f4"), bits=32, kind=3), "mode F from nan to nan"),
        (tiff(np.full((SIDE, SIDE), np.inf, "<f4"), bits=32, kind=3), "mode F from inf to inf"),
    ],
)  # fmt: skip
def test_levels_without_a_known_white_are_refused_everywhere(levels, found, tmp_path):
    with pytest.raises(GreyRangeError, match=found):
        rgb(levels)
    with pytest.raises(Rejected, match=found) as rejected:
        check_image(levels)
    assert rejected.value.reason == Reason.UNKNOWN_GREY_RANGE
    for decoder in ("pil", "torchvision"):
        with pytest.raises(ValueError, match=found):
            decode_image(levels, 8, decoder=decoder)
    assert found in Picture("x", lambda: levels).open()
    (tmp_path / "x.tif").write_bytes(levels)
    with pytest.raises(ValueError, match=found):
        VLMComposerImageProcessor().pixels_of(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("name", DEEP)
def test_every_reader_sees_the_same_pixels(name, tmp_path):
    data, expected = DEEP[name], rgb(DEEP[name])
    for decoder in ("pil", "torchvision"):
        pixels = decode_image(data, SIDE, decoder=decoder).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(np.array(Picture("x", lambda: data).open()), expected)
    path = tmp_path / "x"
    path.write_bytes(data)
    processor = VLMComposerImageProcessor({"height": SIDE, "width": SIDE})
    for image in (str(path), Image.open(path)):
        np.testing.assert_array_equal(processor.pixels_of(image).permute(1, 2, 0), expected)


MODES = (
    *("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"),
    *("HSV", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"),
)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (4, 3)))
    assert (image.mode, image.size) == ("RGB", (4, 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_what_is_transparent_becomes_white_in_every_mode_with_alpha(mode):
    assert np.array(to_rgb(Image.new(mode, (4, 3), 0))).min() == 255


def test_premultiplied_alpha_is_undone():
    image = Image.new("RGBA", (4, 4), (200, 100, 0, 128))
    found, expected = (np.array(to_rgb(x)).astype(int) for x in (image.convert("RGBa"), image))
    assert np.abs(found - expected).max() <= 1
    assert np.abs(expected - [227, 177, 127]).max() <= 1


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\nshowpage\n"


def test_what_would_start_an_outside_program_is_not_an_image(tmp_path):
    with pytest.raises(Image.UnidentifiedImageError), open_image(EPS):
        pass
    (tmp_path / "x.jpg").write_bytes(EPS)
    with pytest.raises(OSError, match="cannot identify"):
        VLMComposerImageProcessor().pixels_of(str(tmp_path / "x.jpg"))
    assert isinstance(Picture("x.jpg", lambda: EPS).open(), str)
    for decoder in ("pil", "torchvision"):
        with pytest.raises(ValueError, match="not a readable image"):
            decode_image(EPS, 8, decoder=decoder)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    side = 1 << 13
    bomb = encode(Image.new("1", (side, side + 1)))
    with pytest.raises(ImageTooLargeError, match=f"{side} × {side + 1} is over the limit"):
        rgb(bomb)
    text = Picture("x", lambda: bomb).open()
    assert f"over the limit of {MAX_PIXELS} pixels" in text
    with pytest.raises(ValueError, match="over the limit"):
        decode_image(bomb, 8)


def test_messages_have_no_addresses():
    for data in (b"", b"not an image", EPS):
        said = [Picture("x", lambda data=data: data).open()]
        with pytest.raises(ValueError, match="not a readable image") as error:
            decode_image(data, 8)
        for text in (*said, str(error.value)):
            assert not re.search("0x[0-9a-f]+", text), text
            assert "cannot identify image file the file" in text
    assert describe_error(ValueError(f"{object()} and {object()}")) == "the file and the file"
    assert describe_error(OSError()) == "OSError"


def test_nothing_else_opens_or_converts_images():
    """Every reader of images in the product is one of `images/pil.py`."""
    found = []
    roots = [Path(next(iter(package.__path__))) for package in (vlm_composer, convert)]
    for path in [file for root in roots for file in root.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name, target = node.func.attr, ast.unparse(node.func.value)
            if (name == "open" and target.endswith("Image")) or (
                name in ("convert", "exif_transpose", "getexif")
            ):
                found.append(path.name)
    assert {*found} == {"pil.py"}, found


def test_opening_images_imports_no_torch():
    code = "import sys, vlm_composer.images.pil, convert.images; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
