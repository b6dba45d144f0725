"""A picture of captions beside their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 260  # pixels, a cell's width
IMAGE = 160  # pixels, an image's side
LINES = 56  # pixels below an image for two lines of text


@dataclass(frozen=True)
class Caption:
    """One image with what it is and what the model says of it."""

    image: Image.Image
    truth: str
    generated: str


def draw_contact_sheet(captions: Sequence[Caption], *, columns: int = 3) -> Image.Image:
    """Draw the images in a grid, each over its true and its generated caption.

    Args:
        captions: At least one.
        columns: Images a row.

    Returns:
        An RGB image of `columns` × 260 pixels width.
    """
    rows = -(-len(captions) // columns)
    height = IMAGE + LINES + 40
    sheet = Image.new("RGB", (columns * CELL, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for index, caption in enumerate(captions):
        left, top = index % columns * CELL, index // columns * height
        picture = caption.image.resize((IMAGE, IMAGE), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left + (CELL - IMAGE) // 2, top + 16))
        for line, (text, colour) in enumerate(
            (("true: " + caption.truth, "black"), ("model: " + caption.generated, "#0a58ca"))
        ):
            fitted = _fit(text, font, CELL - 16)
            at = (left + CELL / 2, top + IMAGE + 28 + 22 * line)
            draw.text(at, fitted, fill=colour, font=font, anchor="ma")
    return sheet


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a line to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
