"""`inspect` on real data sets: the numbers, the picture, and a page that runs nothing."""

import json
import re
import shutil
import time
import uuid
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browser import Page as Tab
from convert import ConversionError
from convert.inspect import PAGE, SHEET, describe, inspect_data_set, main
from convert.inspect_page import render_page
from convert.overview import Inspection, Table
from hostile_json import VALUES, leaves, replaced

SMALL = {"eval_ratio": 0.2, "size_limit": 1 << 12}  # bytes: three samples to a shard
HOSTILE = '<script src="http://evil.example/x.js"></script>"\'&<img src=x onerror=alert(1)>'
LOOK = """({
  pictures: [...document.images].map(image => image.naturalWidth * image.complete),
  figures: [...document.querySelectorAll('figure')].map(figure => figure.innerText),
  titles: [...document.querySelectorAll('h2')].map(title => title.innerText),
  bars: [...document.querySelectorAll('.bar div')].map(bar => bar.getBoundingClientRect().width),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


class Page(HTMLParser):
    """What a browser would make of a page: tags, texts, and all that it would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        fields = {name: value or "" for name, value in attrs}
        if fields.get("http-equiv") == "Content-Security-Policy":
            self.policy = fields["content"]
        for name, value in fields.items():
            if name in ("src", "href", "srcset", "data", "action", "poster", "background"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(value)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def written(pairs: Any) -> Any:
    """A data set of 24 train and 6 eval samples in small shards."""
    pairs.add(30)
    pairs.convert(**SMALL)
    return pairs


def page_of(folder: Path) -> Page:
    return Page((folder / PAGE).read_text(encoding="utf-8"))


def table(tables: list[Table], title: str) -> dict[str, int]:
    return dict(next(table.rows for table in tables if table.title == title))


def test_the_command(written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(written.out), "--out", str(tmp_path / "look"), "--samples", "5"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  train +24 samples +8 shards +0\.0 MB$", said, re.M)
    assert re.search(r"^  eval +6 samples +2 shards +0\.0 MB$", said, re.M)
    assert re.search(r"^  Describe picture \d+\.⏎<image> +1 █+$", said, re.M)
    assert re.search(r"^  arguments\.seed +17$", said, re.M)
    assert re.search(r"^  versions\.pillow +\d+\.", said, re.M)
    page = page_of(tmp_path / "look")
    assert page.tags.count("figure") == page.tags.count("img") == 5
    with Image.open(tmp_path / "look" / SHEET) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width == 4 * 260
        assert len(sheet.getcolors(1 << 24)) > 100  # there are pictures on it


@pytest.fixture
def hostile(pairs: Any, tmp_path: Path) -> Path:
    """The folder of a page of four samples, one of which attacks its reader."""
    pairs.add(3)
    pairs.add(
        1,
        id=HOSTILE,
        conversations=[
            {"from": "human", "value": f"<image>\n{HOSTILE}"},
            {"from": "gpt", "value": HOSTILE},
        ],
    )
    pairs.convert(eval_ratio=0)
    inspect_data_set(pairs.out, out=tmp_path)
    return tmp_path


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 360], ids=["screen", "phone"])
def test_a_person_sees_samples_and_numbers(page: Tab, hostile: Path, width: int) -> None:
    page.open_alone(hostile / PAGE, width)
    seen = page.evaluate(LOOK)
    assert min(seen["pictures"]) > 0
    assert len(seen["pictures"]) == len(seen["figures"]) == 4
    assert sum(HOSTILE in text for text in seen["figures"]) == 1
    assert seen["overflow"] <= 0
    assert max(seen["bars"]) > 20
    for title in ("Numbers", "How it was made", "4 random samples"):
        assert title in seen["titles"]


def test_the_page_fetches_and_runs_nothing(hostile: Path) -> None:
    page = page_of(hostile)
    assert page.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not page.handlers
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {*page.tags}
    assert page.tags.count("img") == 4
    assert page.policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert page.texts.count(HOSTILE) == 2  # the answer and the id, as they were written
    assert f"<image>\n{HOSTILE}" in page.texts
    style = page.texts[page.texts.index(next(t for t in page.texts if ":root" in t))]
    assert "url(" not in style
    assert "@import" not in style


def test_what_a_terminal_would_obey_is_shown(
    pairs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = "\x1b]0;owned\x07\x9b31m\u202e"
    conversation = [{"from": "human", "value": codes}, {"from": "gpt", "value": codes}]
    pairs.add(2, conversations=conversation)
    pairs.convert(eval_ratio=0)
    assert main([str(pairs.out), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert r"\x1b]0;owned\x07\x9b31m\u202e⏎<image>" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_numbers_of_a_sample_where_there_are_no_others(written: Any, tmp_path: Path) -> None:
    (written.out / "quality.json").unlink()
    overview = inspect_data_set(written.out, out=tmp_path).overview
    assert overview.basis == "24 random samples of train; there is no quality.json"
    assert table(overview.tables, "Answers, in words") == {"3": 24}
    assert table(overview.tables, "Images, width in pixels") == {"32 to 63": 24}
    assert table(overview.tables, "Images, format") == {"JPEG": 24}
    prompts = table(overview.tables, "Prompts")
    assert len(prompts) == 21
    assert prompts["… and others"] == 4


def test_a_quality_file_that_is_none(written: Any, tmp_path: Path) -> None:
    for text in ("{", "{}", "[]", '{"prompts": 3}'):
        (written.out / "quality.json").write_text(text)
        basis = inspect_data_set(written.out, out=tmp_path).overview.basis
        assert "24 random samples of train; quality.json cannot be used: " in basis


@pytest.mark.parametrize("name", ["quality.json", "summary.json"])
def test_every_value_of_a_file_may_be_hostile(written: Any, name: str) -> None:
    """It is shown, or said not to be what it should; and that at once."""
    path = written.out / name
    document = json.loads(path.read_text())
    for place in leaves(document):
        for new in VALUES:
            path.write_text(json.dumps(replaced(document, place, new)))
            started = time.monotonic()
            overview = Inspection(str(written.out)).overview("train", 17)
            lines = "\n".join(describe(overview)).splitlines()
            assert all(line.isprintable() for line in lines), (place, new)
            assert len(lines) < 1000
            assert time.monotonic() - started < 10, (place, new)
            render_page(overview, []).encode()


NO_JSON = ("[" * 9999, '{"samples": ' + "9" * 5000 + "}", '"\\ud800"', "\x80")


@pytest.mark.parametrize("text", NO_JSON, ids=range(len(NO_JSON)))
def test_a_file_that_is_no_json(
    written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    for name in ("quality.json", "summary.json"):
        (written.out / name).write_text(text, encoding="latin-1")
    assert main([str(written.out), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"quality\.json cannot be used: ValueError\(.it is not ", said)
    assert re.search(r"summary\.json +it is not ", said)


def test_the_seed_decides_which(written: Any) -> None:
    def picked(seed: int) -> list[tuple[str, int]]:
        samples = Inspection(str(written.out)).pick("train", 6, seed)
        return [(sample.shard.name, sample.number) for sample in samples]

    first = picked(1)
    assert len({*first}) == 6
    assert first == sorted(first) == picked(1) != picked(2)


def test_every_sample_can_be_picked(written: Any) -> None:
    for side in ("train", "eval"):
        picked = Inspection(str(written.out)).pick(side, 1000, 0)
        assert [sample.record for sample in picked] == written.read(side)


def test_several_sources(two_sources: Any, tmp_path: Path) -> None:
    out = two_sources.out
    overview = inspect_data_set(out, side="eval", samples=2, out=tmp_path / "look").overview
    counted = {count.folder.path: count.samples for count in overview.counts}
    assert [*counted] == ["first/train", "first/eval", "second/train", "second/eval"]
    assert counted["first/train"] + counted["first/eval"] == 16
    assert counted["second/train"] + counted["second/eval"] == 24
    texts = page_of(tmp_path / "look").texts
    for name in ("first", "second"):
        assert sum(f"{name}/eval/shard." in text for text in texts) == min(
            2, counted[f"{name}/eval"]
        )


def test_numbers_of_the_conversion(written: Any, tmp_path: Path) -> None:
    overview = inspect_data_set(written.out, out=tmp_path).overview
    assert overview.basis == "all samples, as quality.json has them"
    assert table(overview.tables, "Answers, in words") == {"3": 30}
    assert table(overview.tables, "Images, width in pixels") == {"32 to 63": 30}
    assert table(overview.tables, "Images, format") == {"JPEG": 30}
    prompts = table(overview.tables, "Prompts")
    assert len(prompts) == 21
    assert prompts["… and others"] == 10
    assert {*table(overview.tables, "To look at").values()} == {0}


def test_a_broken_image_is_grey(written: Any, tmp_path: Path) -> None:
    for path in (written.out / "train").glob("*.mds"):
        path.write_bytes(path.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xff\xff"))
    (written.out / "quality.json").unlink()
    report = inspect_data_set(written.out, samples=3, out=tmp_path)
    assert report.overview.basis.endswith("; 24 more have broken images")
    assert sum("not_an_image" in text for text in page_of(tmp_path).texts) == 3


def test_what_cannot_be_inspected(
    written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, torn, short = tmp_path / "features", tmp_path / "torn", tmp_path / "short"
    for copy in (features, torn, short):
        shutil.copytree(written.out, copy)
    (features / "train" / "features.json").write_text("{}")
    (torn / "eval" / "index.json").unlink()
    for path in (short / "train").glob("*.mds"):
        path.write_bytes(path.read_bytes()[:100])
    for place, problem in (
        (tmp_path / "nowhere", "no such folder"),
        (features, "holds features, and no images"),
        (torn, "eval/index.json: missing: the conversion did not finish"),
        (short, "`python -m convert verify` tells all that is wrong"),
    ):
        assert main([str(place), "--out", str(tmp_path / "look")]) == 1
        said = capsys.readouterr().err
        assert said.startswith("convert inspect: ")
        assert problem in said
    assert main([str(written.out), "--samples", "0"]) == 1
    shutil.rmtree(written.out / "eval")
    with pytest.raises(ConversionError, match="has no eval side"):
        inspect_data_set(written.out, side="eval", out=tmp_path)


@pytest.mark.s3
def test_a_bucket(pairs: Any, s3_server: Any, tmp_path: Path) -> None:
    url = s3_server.make_bucket(f"inspect-{uuid.uuid4().hex}") + "/prefix"
    pairs.add(20)
    pairs.convert(url, **SMALL)
    pairs.convert(**SMALL)
    summaries = [inspect_data_set(place, out=tmp_path).overview for place in (pairs.out, url)]
    assert [c.samples for c in summaries[1].counts] == [16, 4]
    assert summaries[0].tables == summaries[1].tables
    assert page_of(tmp_path).tags.count("figure") == 16
