"""A picture of images with text below them."""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import combining, normalize

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlm_composer.storage import FolderStore

log = logging.getLogger(__name__)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELL = 260  # pixels, a cell's width
IMAGE = 160  # pixels, the side of the square that an image is fitted into
LINE = 22  # pixels, a line's height
_FONT_SIZE = 14
_FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
)
_FONT_SUFFIXES = {".ttf", ".otf", ".ttc"}
_NO_CHARACTER = "\U0010fffe"
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
    fonts = _Fonts()
    for index, cell in enumerate(cells):
        left, top = index % columns * CELL, index // columns * height
        picture = ImageOps.contain(cell.image, (IMAGE, IMAGE), Image.Resampling.LANCZOS)
        at = left + (CELL - picture.width) // 2, top + 16 + (IMAGE - picture.height) // 2
        sheet.paste(picture, at)
        line = 0
        for text in cell.texts:
            font, drawable = fonts.choose(text.text[:_MAX_CHARACTERS])
            for fitted in _wrap(replace(text, text=drawable), font, CELL - 16):
                place = (left + CELL / 2, top + IMAGE + 28 + LINE * line)
                draw.text(place, fitted, fill=text.colour, font=font, anchor="ma")
                line += 1
    fonts.warn()
    return sheet


class _Fonts:
    """Pillow's own font, and the system's for the characters that it lacks."""

    def __init__(self) -> None:
        self._fonts: list[Font] = [ImageFont.load_default(size=_FONT_SIZE)]
        self._files = _font_files()
        self._missing: set[str] = set()

    def choose(self, text: str) -> tuple[Font, str]:
        """Return a font that has every character of a text, and what to draw of the text.

        Where no font does, accents are left out, and a number stands in place of what cannot be
        drawn.
        """
        text = "".join(c for c in text if c.isspace() or c.isprintable())
        characters = {c for c in text if not c.isspace()}
        for font in self._all():
            if all(_has(font, c) for c in characters):
                return font, text
        font = self._fonts[0]
        text = "".join(c if _has(font, c) else _without_accents(c) for c in text)
        lacking = {c for c in text if not c.isspace() and not _has(font, c)}
        self._missing |= lacking
        parts = itertools.groupby(text, lacking.__contains__)
        counted = (f"[{len(list(p))} characters]" if out else "".join(p) for out, p in parts)
        return font, "".join(counted)

    def warn(self) -> None:
        """Log once what could not be drawn."""
        if self._missing:
            log.warning(
                "No installed font has %d characters of the texts, such as U+%04X: the image shows "
                "how many they are in place of them; install a font for their script.",
                len(self._missing),
                ord(min(self._missing)),
            )

    def _all(self) -> Iterator[Font]:
        yield from list(self._fonts)
        for file in self._files:
            try:
                font = ImageFont.truetype(str(file), _FONT_SIZE)
            except OSError:  # a font of bitmaps of other sizes, or none that FreeType reads
                continue
            self._fonts.append(font)
            yield font


def _font_files() -> Iterator[Path]:
    for folder in (Path(folder).expanduser() for folder in _FONT_FOLDERS):
        files = (folder / name for name in FolderStore(str(folder)).names())
        yield from (path for path in files if path.suffix.lower() in _FONT_SUFFIXES)


def _without_accents(character: str) -> str:
    return "".join(c for c in normalize("NFKD", character) if not combining(c))


def _has(font: Font, character: str) -> bool:
    """Tell whether a font draws more than its box for what it lacks."""
    return bytes(font.getmask(character)) != bytes(font.getmask(_NO_CHARACTER))


def _wrap(text: Text, font: Font, width: int) -> list[str]:
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


def _fit(line: str, font: Font, width: int) -> str:
    """Shorten a line to a width in pixels."""
    if font.getlength(line) <= width:
        return line

    def too_wide(count: int) -> bool:
        return font.getlength(line[:count] + "…") > width

    return line[: bisect_left(range(1, len(line)), True, key=too_wide)] + "…"
