"""Where images and texts stand on a contact sheet, and that no text breaks it."""

import pytest
from PIL import Image

from vlm_composer.data.contact_sheet import CELL, IMAGE, LINE, Cell, Text, draw_contact_sheet

RED, BLUE = (255, 0, 0), (0, 0, 255)


def square(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def colours(sheet):
    return {colour for _, colour in sheet.getcolors(1 << 20)}


def test_a_contact_sheet_has_a_cell_for_each_image():
    one = draw_contact_sheet([Cell(square(RED), [Text("a red square")])])
    two = draw_contact_sheet([Cell(square(c), [Text("a square")]) for c in (RED, BLUE)])
    assert one.size == two.size == (3 * CELL, IMAGE + 52 + LINE)
    assert {RED, BLUE} <= colours(two)
    assert BLUE not in colours(one)


def test_an_image_keeps_its_shape():
    sheet = draw_contact_sheet([Cell(square(RED, (64, 16)), [])], columns=1)
    red = [sheet.getpixel((CELL // 2, y)) == RED for y in range(sheet.height)]
    assert sum(red) == IMAGE // 4


def test_a_text_has_as_many_lines_as_it_may():
    def drawn(lines):
        sheet = draw_contact_sheet([Cell(square(RED), [Text("word " * 40, lines=lines)])])
        below = (
            sheet.crop((0, IMAGE + 20, CELL, sheet.height)).convert("L").point(lambda v: 255 - v)
        )
        return below.getbbox()[3] - below.getbbox()[1]

    assert drawn(1) < LINE
    assert 2 * LINE < drawn(3) < 3 * LINE


TEXTS = {
    "none": "",
    "blank": " \n\t",
    "lines": "one\ntwo\r\nthree",
    "a long word": "x" * 100_000,
    "codes": "\x00\x1b[31m",
    "scripts": "猫 кот 🐈",
    "from right to left": "\u202e abc",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_any_text_can_be_drawn(text):
    draw_contact_sheet([Cell(square(RED), [Text(text, lines=2), Text(text)])])
