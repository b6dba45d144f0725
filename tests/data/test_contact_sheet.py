"""Where images and texts stand on a contact sheet, and that no text breaks it."""

import logging

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageChops

from vlm_composer.data import contact_sheet
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


SCRIPTS = {"cjk": "猫は", "cyrillic": "кот", "arabic": "قطة", "emoji": "a 🐈 b"}


@pytest.fixture
def no_fonts(monkeypatch):
    monkeypatch.setattr(contact_sheet, "_FONT_FOLDERS", ())


def drawn(text):
    return draw_contact_sheet([Cell(square(RED), [Text(text)])])


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_what_no_font_has_is_counted_and_not_drawn_as_boxes(text, no_fonts, caplog):
    with caplog.at_level(logging.WARNING):
        found = drawn(text)
    lacking = "".join(c for c in text if ord(c) > 127)
    expected = drawn(text.replace(lacking, f"[{len(lacking)} characters]"))
    assert ImageChops.difference(found, expected).getbbox() is None
    (record,) = caplog.records
    assert "No installed font has" in record.getMessage()
    assert f"U+{ord(min(lacking)):04X}" in record.getMessage()


def test_latin_text_needs_no_other_font(no_fonts, caplog):
    found = drawn("Ünïcode, a café…")
    assert not caplog.records
    assert ImageChops.difference(found, drawn("Unicode, a cafe…")).getbbox() is None


def font_with(path, character):
    """A font that has one character: a full square."""
    pen = TTGlyphPen(None)
    for at, corner in enumerate([(0, 0), (0, 900), (900, 900), (900, 0)]):
        (pen.lineTo if at else pen.moveTo)(corner)
    pen.closePath()
    empty = TTGlyphPen(None).glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square"})
    builder.setupGlyf({".notdef": empty, "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_a_font_of_the_system_draws_what_the_built_in_one_lacks(monkeypatch, tmp_path, caplog):
    (tmp_path / "a broken.ttf").write_bytes(b"no font")
    font_with(tmp_path / "b.ttf", "猫")
    monkeypatch.setattr(contact_sheet, "_FONT_FOLDERS", (str(tmp_path), "/nowhere"))
    text = drawn("猫").crop((0, IMAGE + 20, CELL, IMAGE + 52 + LINE)).convert("L")
    assert not caplog.records
    left, top, right, bottom = text.point(lambda level: 255 * (level < 128)).getbbox()
    assert (right - left, bottom - top) in {(12, 12), (12, 13), (13, 13), (13, 12)}, "0.9 × 14"
    assert text.crop((left + 1, top + 1, right - 1, bottom - 1)).getextrema()[1] == 0, "full"
    drawn("猫は")  # it has one of the two: a number stands for both
    assert "has 2 characters" in caplog.text
