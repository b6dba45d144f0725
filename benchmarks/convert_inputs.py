"""What `convert.py` converts: photos in a folder, and small pictures in a tar by the million."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DIFFERENT_PHOTOS = 256
"""The others are these with another comment in the file: drawing takes longer than converting."""


def write_photos(folder: Path, count: int) -> None:
    """Write pairs.json and images/, JPEGs of about 50 kB of which no two have the same bytes."""
    from benchmarks.faithful_towers import _photo  # imports torch, which workers would as well

    pixels = np.random.default_rng(7)
    photos = []
    for _ in range(min(count, DIFFERENT_PHOTOS)):
        buffer = BytesIO()
        _photo(pixels).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    items = []
    for item in _items(count):
        number = int(item["id"])
        path = folder / "images" / item["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_numbered(photos[number % len(photos)], number))
        items.append(item)
    (folder / "pairs.json").write_text(json.dumps(items))


def write_small(folder: Path, count: int) -> None:
    """Write pairs.jsonl and images.tar, JPEGs of 16 × 16 pixels and about 700 bytes."""
    pictures = []
    for noise in np.random.default_rng(7).integers(0, 256, (64, 16, 16, 3), np.uint8):
        buffer = BytesIO()
        Image.fromarray(noise).save(buffer, "JPEG", quality=20)
        pictures.append(buffer.getvalue())
    with (
        (folder / "pairs.jsonl").open("w") as lines,
        tarfile.open(folder / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for item in _items(count):
            number = int(item["id"])
            data = _numbered(pictures[number % len(pictures)], number)
            member = tarfile.TarInfo(item["image"])
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
            tar.members.clear()  # it keeps them all
            lines.write(json.dumps(item) + "\n")


def _items(count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(7)
    prompts = [f"Describe the image in {words} words." for words in range(10)]
    for number in range(count):
        caption = "".join(draw.choices("abcdefghij klmnop", k=60))
        turns = (("human", f"{draw.choice(prompts)}\n<image>"), ("gpt", caption))
        yield {
            "id": f"{number:09}",
            "image": f"{number // 1000:05}/{number:09}.jpg",
            "conversations": [{"from": who, "value": text} for who, text in turns],
        }


def _numbered(jpeg: bytes, number: int) -> bytes:
    """The same picture with a comment."""
    comment = b"%09d" % number
    return b"%b\xff\xfe%b%b%b" % (
        jpeg[:2],
        (len(comment) + 2).to_bytes(2, "big"),
        comment,
        jpeg[2:],
    )
