"""torchvision decodes to PIL's bits, scales closely, and refuses the same files."""

import io
import json
import shutil
import struct
import zlib
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import SiglipImageProcessor

from convert.errors import Rejected
from convert.images import check_image
from vlm_composer import train
from vlm_composer.assembly import assemble_template
from vlm_composer.config.changes import changed_settings
from vlm_composer.data import images
from vlm_composer.data.images import decode_image
from vlm_composer.loaders import assemble_encoder

MAX_LEVELS, MEAN_LEVELS = 2, 0.01
"""Largest and mean difference of a scaled image from Hugging Face's, in grey levels of 255."""


def photo(width: int, height: int, grain: float = 6) -> Image.Image:
    """Smooth waves of colour with noise on them."""
    random = np.random.default_rng([width, height, int(grain)])
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.zeros((height, width, 3)) + random.uniform(60, 190, 3)
    for _ in range(6):
        down, across = random.uniform(-30, 30, 2)
        wave = np.sin(down * y + across * x + random.uniform(0, 6))
        pixels += random.uniform(5, 40) * wave[..., None] * random.uniform(0.3, 1, 3)
    pixels += random.normal(0, grain, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


JPEGS = {
    **{f"quality {q}": {"quality": q} for q in (30, 75, 95)},
    **{f"subsampling {s}": {"subsampling": s} for s in ("4:4:4", "4:2:2", "4:2:0")},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 4},
    "RGB": {"keep_rgb": True},
    "optimised": {"optimize": True},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS.keys())
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_decode_to_the_same_bits(options, mode):
    for size in ((64, 48), (33, 57), (1, 1)):
        data = encode(photo(*size).convert(mode), "JPEG", **options)
        ours = images._decode_jpeg(data)
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("side", [32, 224, 384])
@pytest.mark.parametrize("grain", [0, 6, 60])
def test_scaled_images_are_close_to_the_image_processor(resample, side, grain):
    processor = SiglipImageProcessor(size={"height": side, "width": side}, resample=resample,
                                     do_rescale=False, do_normalize=False)  # fmt: skip
    for size in ((400, 300), (250, 375), (side, side), (20, 31), (2, 190), (200, 3), (1, 1)):
        data = encode(photo(*size, grain), "JPEG")
        # An image three pixels high has two axes that could be its channels.
        expected = processor(
            Image.open(io.BytesIO(data)), return_tensors="pt", input_data_format="channels_last"
        ).pixel_values[0]
        pixels = decode_image(data, side, resample)
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, side, side)
        assert pixels.is_contiguous()
        difference = (pixels.int() - expected.int()).abs()
        assert difference.max() <= MAX_LEVELS
        assert difference.float().mean() <= MEAN_LEVELS


def test_a_filter_that_torch_lacks_is_pils():
    data = encode(photo(50, 40), "JPEG")
    lanczos = Image.Resampling.LANCZOS
    assert torch.equal(decode_image(data, 32, lanczos), decode_image(data, 32, lanczos, "pil"))


def png(depth: int, colour_type: int, channels: int, transparent: bytes = b"") -> bytes:
    """An 8 × 8 PNG of a kind that PIL does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 8, 8, depth, colour_type, 0, 0, 0)
    row = b"\0" + bytes(range(0, 2 * channels * depth, 2))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(row * 8))
        + chunk(b"IEND", b"")
    )


def with_wrong_crc(data: bytes) -> bytes:
    """PIL reads such a PNG, libpng does not."""
    end = data.index(b"IEND") - 8
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


RGB, GREY = photo(48, 32), photo(48, 32).convert("L")
ALPHA = Image.merge("RGBA", [*RGB.split(), Image.linear_gradient("L").resize((48, 32))])
MOVING = {"save_all": True, "append_images": [RGB.rotate(180)]}
ODD = {
    "grey JPEG": encode(GREY, "JPEG", progressive=True),
    "CMYK JPEG": encode(RGB.convert("CMYK"), "JPEG"),
    "several JPEGs in one": encode(RGB, "MPO", **MOVING),
    "JPEG turned by XMP": encode(RGB, "JPEG", xmp=b'<rdf:Description tiff:Orientation="6"/>'),
    "JPEG with a broken EXIF": encode(RGB, "JPEG", exif=b"Exif\0\0no TIFF header"),
    "JPEG with half an EXIF": encode(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\5\1\x12"),
    "JPEG with trailing bytes": encode(RGB, "JPEG") + b"trailing",
    "JPEG with a profile": encode(RGB, "JPEG", icc_profile=bytes(3000)),
    "RGBA PNG": encode(ALPHA, "PNG"),
    "LA PNG": encode(ALPHA.convert("LA"), "PNG"),
    "palette PNG": encode(RGB.convert("P"), "PNG"),
    "transparent palette PNG": encode(RGB.convert("P"), "PNG", transparency=bytes(range(200))),
    "bilevel PNG": encode(GREY.convert("1"), "PNG"),
    "16-bit grey PNG": encode(GREY.convert("I;16"), "PNG"),
    "16-bit grey PNG, transparent": png(16, 0, 1, b"\0\2"),
    "16-bit RGB PNG": png(16, 2, 3),
    "16-bit RGBA PNG": png(16, 6, 4),
    "RGB PNG, transparent colour": png(8, 2, 3, b"\0\0\0\2\0\4"),
    "grey PNG of 4 bits": png(4, 0, 1),
    "PNG with a wrong checksum": with_wrong_crc(encode(RGB, "PNG")),
    "PNG with a broken EXIF": encode(RGB, "PNG", exif=b"no TIFF header"),
    "moving PNG": encode(RGB, "PNG", **MOVING),
    "WebP": encode(RGB, "WEBP"),
    "lossless WebP": encode(RGB, "WEBP", lossless=True),
    "RGBA WebP": encode(ALPHA, "WEBP"),
    "moving WebP": encode(RGB, "WEBP", **MOVING),
    "WebP with a broken EXIF": encode(RGB, "WEBP", exif=b"Exif\0\0no TIFF header"),
    "GIF": encode(RGB, "GIF"),
    "transparent GIF": encode(RGB.convert("P"), "GIF", transparency=3),
    "moving GIF": encode(RGB, "GIF", **MOVING),
    "BMP": encode(RGB, "BMP"),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
def test_what_convert_accepts_is_decoded_alike(data):
    check_image(data)
    difference = decode_image(data, 24).int() - decode_image(data, 24, decoder="pil").int()
    assert difference.abs().max() <= MAX_LEVELS


def test_a_jpeg_that_torchvision_refuses_is_pils_to_read(monkeypatch):
    data = ODD["grey JPEG"]
    expected = decode_image(data, 24)

    def refuse(*arguments, **options):
        raise RuntimeError("arithmetic coding")

    monkeypatch.setattr(images, "decode_jpeg", refuse)
    assert torch.equal(decode_image(data, 24), expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}])
def test_damaged_jpegs_are_read_or_refused_by_both(options):
    data, random = encode(photo(64, 48), "JPEG", **options), np.random.default_rng(0)
    num_read = 0
    for _ in range(150):
        damaged = bytearray(data[: random.integers(20, 2 * len(data))])
        for _ in range(random.integers(3)):
            damaged[random.integers(2, len(damaged))] = random.integers(256)
        read = []
        for decoder in ("torchvision", "pil"):
            with suppress(ValueError):
                read.append(decode_image(bytes(damaged), 16, decoder=decoder))
        assert len(read) != 1
        num_read += len(read) == 2
        with suppress(Rejected):
            check_image(bytes(damaged))
            assert len(read) == 2
    assert 0 < num_read < 150


class Decoded(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return decode_image(encode(photo(300 + index, 200), "JPEG"), 224)


@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_is_deterministic_in_any_process(workers):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # as many as a parent may have when it forks its workers
    try:
        first = [Decoded()[index] for index in range(8)]
        for decoded, expected in zip(
            DataLoader(Decoded(), batch_size=None, num_workers=workers), first, strict=True
        ):
            assert torch.equal(decoded, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
def test_the_yaml_chooses_the_decoder(tiny_config, decoder):
    config = tiny_config(image_decoder=decoder)
    encoder = assemble_encoder(config, assemble_template(config))
    data = encode(photo(300, 200, 60), "JPEG")
    batch = encoder([{"id": "a", "image": data, "prompt": "<image>", "answer": "b"}])
    pixels = {name: decode_image(data, 32, decoder=name) for name in ("torchvision", "pil")}
    assert torch.equal(batch["pixel_values"][0], pixels[decoder])
    assert not torch.equal(*pixels.values())


def test_a_tower_with_a_filter_that_torch_lacks_is_said_once(tiny_yaml, towers, tmp_path, capsys):
    tower = shutil.copytree(towers / "siglip", tmp_path / "lanczos")
    settings = json.loads((tower / "preprocessor_config.json").read_text())
    (tower / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 1}))
    assert train.main([str(tiny_yaml(vision_tower={"name": str(tower), "dtype": "fp32"}))]) == 0
    said = capsys.readouterr().err
    assert said.count("scales its images with LANCZOS, which torch does not have") == 1


def test_another_decoder_is_a_changed_setting(tiny_config):
    saved = asdict(tiny_config(image_decoder="pil"))
    assert changed_settings(saved, tiny_config()) == ["image_decoder: pil became torchvision"]
