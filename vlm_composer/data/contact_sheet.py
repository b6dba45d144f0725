"""A picture of images with text below them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 260  # pixels, a cell's width
IMAGE = 160  # pixels, the side of the square that an image is fitted into
LINE = 22  # pixels, a line's height
_MAX_CHARACTERS = 1000
"""Of a text that are looked at: far more than its lines hold, whatever a data set says."""


@dataclass(frozen=True)
class Text:
    """What stands below an image."""

    text: str
    colour: str = "black"
    lines: int = 1
    """It is wrapped to that many, and shortened where they do not hold it."""


@dataclass(frozen=True)
class Cell:
    """One image and its texts, in order."""

    image: Image.Image
    texts: Sequence[Text]


def draw_contact_sheet(cells: Sequence[Cell], *, columns: int = 3) -> Image.Image:
    """Draw images in a grid, each over its texts.

    Args:
        cells: At least one.
        columns: Images a row.

    Returns:
        An RGB image of `columns` × 260 pixels width.
    """
    rows = -(-len(cells) // columns)
    height = IMAGE + 52 + LINE * max(sum(text.lines for text in cell.texts) for cell in cells)
    sheet = Image.new("RGB", (columns * CELL, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for index, cell in enumerate(cells):
        left, top = index % columns * CELL, index // columns * height
        picture = ImageOps.contain(cell.image, (IMAGE, IMAGE), Image.Resampling.LANCZOS)
        at = left + (CELL - picture.width) // 2, top + 16 + (IMAGE - picture.height) // 2
        sheet.paste(picture, at)
        line = 0
        for text in cell.texts:
            for fitted in _wrap(text, font, CELL - 16):
                place = (left + CELL / 2, top + IMAGE + 28 + LINE * line)
                draw.text(place, fitted, fill=text.colour, font=font, anchor="ma")
                line += 1
    return sheet


def _wrap(text: Text, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into lines of a width in pixels."""
    words = text.text[:_MAX_CHARACTERS].split()
    lines: list[str] = []
    while words and len(lines) < text.lines - 1:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        lines.append(_fit(" ".join(words[:taken]), font, width))
        words = words[taken:]
    if words:
        lines.append(_fit(" ".join(words), font, width))
    return lines


def _fit(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a line to a width in pixels."""
    if font.getlength(line) <= width:
        return line

    def too_wide(count: int) -> bool:
        return font.getlength(line[:count] + "…") > width

    return line[: bisect_left(range(1, len(line)), True, key=too_wide)] + "…"
