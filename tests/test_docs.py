"""README and docs/: links lead somewhere; docs/security.md lists what the code takes."""

import re
from pathlib import Path
from typing import get_args

import pytest

from vlm_composer.images.pil import FORMATS, MAX_PIXELS
from vlm_composer.mds.encodings import array_encoding
from vlm_composer.mds.index import Compression

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
SECURITY = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def row(first: str) -> str:
    """Return a row of the table of rules, by what its first cell begins with."""
    (found,) = [line for line in SECURITY.splitlines() if line.startswith(f"| {first}")]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    missing = [link for link in local if not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []


def test_the_readme_is_one_page_and_links_every_page_of_docs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text


def test_files_that_the_security_page_names_exist():
    places = re.findall(r"`((?:vlm_composer|convert)/[\w./]+)`", SECURITY)
    assert len(places) >= 10
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_the_security_page_lists_what_is_taken():
    images = row("images").replace("JPEG 2000", "JPEG2000")
    names = re.findall(r"[A-Za-z]+[0-9]*", images.partition("whatever")[0].partition("| ")[2])
    assert {*FORMATS} <= {name.upper() for name in names}
    assert f"{round(MAX_PIXELS / 1e6)} million pixels" in images
    columns = row("columns of MDS")
    for dtype in re.findall(r"uint16|float16|float32|[a-z]+int[0-9]+", columns):
        array_encoding(dtype, (1, 1))
    assert all(f"{name}" in row("compression") for name in get_args(Compression))
