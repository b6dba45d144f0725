"""Decoded pixels equal those of Hugging Face's processor; transparency and rotation are handled."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import SiglipImageProcessor

from vlm_composer.data.images import decode_image, preprocessor_settings


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


both_decoders = pytest.mark.parametrize("decoder", ["torchvision", "pil"])


def noise(width: int, height: int) -> Image.Image:
    bands = [Image.effect_noise((width, height), 60 + 20 * i) for i in range(3)]
    return Image.merge("RGB", bands)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(64, 64), (97, 31), (13, 200), (1, 5)])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_pixels_equal_the_image_processor(form, size, resample):
    data = encode(noise(*size), form)
    processor = SiglipImageProcessor(size={"height": 48, "width": 48}, resample=resample,
                                     do_rescale=False, do_normalize=False)  # fmt: skip
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="np").pixel_values[0]
    pixels = decode_image(data, 48, resample, "pil")
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 48, 48)
    assert pixels.is_contiguous()
    np.testing.assert_array_equal(pixels.numpy(), expected)


@both_decoders
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_becomes_white(mode, decoder):
    image = Image.new(mode, (8, 8), 0)
    assert (decode_image(encode(image), 8, decoder=decoder) == 255).all()


@both_decoders
def test_a_transparent_colour_of_a_palette_becomes_white(decoder):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30] * 256)
    assert (decode_image(encode(image, transparency=0), 8, decoder=decoder) == 255).all()


@both_decoders
@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16"])
def test_other_modes_become_rgb(mode, decoder):
    form = "JPEG" if mode == "CMYK" else "PNG"
    data = encode(Image.new(mode, (8, 8)), form)
    assert decode_image(data, 8, decoder=decoder).shape == (3, 8, 8)


@both_decoders
def test_rotated_photographs_stand_upright(decoder):
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = decode_image(encode(image, exif=exif), 8, decoder=decoder)
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == 255).all()


@both_decoders
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_set_upright_as_pil_does(orientation, decoder):
    image = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("PNG", "JPEG"):
        data = encode(image, form, exif=exif)
        expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        pixels = decode_image(data, 8, decoder=decoder)
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)


@both_decoders
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_a_broken_exif_tag_breaks_no_picture(form, decoder):
    image = noise(8, 8)
    plain, broken = encode(image, form), encode(image, form, exif=b"Exif\0\0no TIFF header")
    assert torch.equal(
        decode_image(broken, 8, decoder=decoder), decode_image(plain, 8, decoder=decoder)
    )


JPEG = encode(noise(64, 64), "JPEG")


@both_decoders
@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", JPEG[:700], JPEG[: len(JPEG) // 2], JPEG[:-200]],
    ids=["empty", "text", "start", "half", "most"],
)
def test_what_is_no_image_is_a_value_error(data, decoder):
    with pytest.raises(ValueError, match=f"{len(data)} bytes that are not a readable image"):
        decode_image(data, 8, decoder=decoder)


def test_settings_come_from_the_preprocessor_file_or_its_defaults():
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    assert preprocessor_settings(given) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2)
    assert preprocessor_settings({}) == ((0.5,) * 3, (0.5,) * 3, 3)
