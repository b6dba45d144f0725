"""The page as a person sees it, in headless Chromium: on a screen, a phone and paper."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from browser import Page
from run_folders import EVALUATIONS, FACTS, metric_lines, whole_run, write_captions, write_lines
from runs import run
from vlm_composer.report.write import write_report

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parent.parent.parent
SECTIONS = (
    "verdict",
    "captions",
    "curves",
    "warnings",
    "data",
    "model",
    "time",
    "hardware",
    "versions",
    "reproducibility",
    "configuration",
)
LOOK = """
(() => {
  const seen = e => { const b = e.getBoundingClientRect(), s = getComputedStyle(e);
    return b.width > 40 && b.height > 10 && s.visibility === 'visible' && +s.opacity > 0; };
  const width = document.documentElement.clientWidth;  // innerWidth grows with what is too wide
  const text = e => e.innerText.trim();
  return {
    sections: Object.fromEntries([...document.querySelectorAll('section')].map(
      e => [e.id, {seen: seen(e), title: text(e.querySelector('h2')), text: text(e)}])),
    charts: [...document.querySelectorAll('.chart')].map(e => {
      const svg = e.querySelector(':scope > svg'), box = svg?.getBoundingClientRect();
      return {title: text(e.querySelector('h3')), text: text(e), width: box?.width ?? 0,
        height: box?.height ?? 0, label: svg?.getAttribute('aria-label') ?? '',
        lines: svg ? [...svg.querySelectorAll('path.line')].map(p => p.getTotalLength()) : [],
        bars: svg ? svg.querySelectorAll('rect.bar').length : 0,
        dots: svg ? svg.querySelectorAll('circle').length : 0,
        tooltips: svg ? [...svg.querySelectorAll('title')].map(t => t.textContent) : [],
        ticks: svg ? [...svg.querySelectorAll('text.tick')].map(t => t.textContent) : [],
        outside: svg ? [...svg.querySelectorAll('text,rect,circle,path')].filter(t => {
          const b = t.getBoundingClientRect(); return b.left < box.left - 2 ||
            b.right > box.right + 2 || b.top < box.top - 2 || b.bottom > box.bottom + 2; }).length
            : 0};
    }),
    pictures: [...document.images].map(i => i.naturalWidth * i.complete),
    overflow: document.documentElement.scrollWidth - width,
    wide: [...document.querySelectorAll('body *')].filter(
      e => e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 80)),
    width, scripts: document.scripts.length,
    elements: document.querySelectorAll('*').length,
    back: getComputedStyle(document.body).backgroundColor,
    fetched: performance.getEntriesByType('resource').map(e => e.name)
      .filter(name => !name.startsWith('data:')),
  };
})()
"""


def show(page: Page, path: Path, width: int = 1200) -> dict:
    """Open a report and look at it; nothing may be fetched or complained of."""
    page.open_alone(path, width)
    seen = page.evaluate(LOOK)
    assert width - 20 <= seen["width"] <= width, "but for a scroll bar"
    assert seen["fetched"] == []
    return seen


def colours(png: bytes) -> int:
    with Image.open(io.BytesIO(png)) as image:
        return len(image.convert("RGB").getcolors(1 << 24))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(whole_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.mark.parametrize("width", [1200, 360], ids=["screen", "phone"])
def test_a_person_sees_all_of_it(page: Page, report: Path, width: int) -> None:
    seen = show(page, report, width)
    assert set(seen["sections"]) == set(SECTIONS)
    for name, section in seen["sections"].items():
        assert section["seen"], name
        assert section["title"], name
        assert len(section["text"]) > len(section["title"]) + 20, name
        assert "Not here" not in section["text"], name
    assert len(seen["charts"]) == 10
    for chart in seen["charts"]:
        assert chart["width"] > 240, chart["title"]
        assert chart["height"] > 140, chart["title"]
        assert chart["bars"] >= 8 or max(chart["lines"]) > 50, chart["title"]
        assert len(chart["ticks"]) > 5, chart["title"]
        assert chart["tooltips"], chart["title"]
        assert chart["outside"] == 0, chart["title"]
        assert len(chart["label"]) > len(chart["title"]) + 20, "a text for who does not see it"
    assert len(seen["pictures"]) == 3
    assert min(seen["pictures"]) > 0
    assert seen["wide"] == []
    assert seen["overflow"] <= 0
    assert seen["scripts"] == 0
    assert colours(page.screenshot()) > 50


def test_the_verdict_comes_first_and_is_plain(page: Page, report: Path) -> None:
    seen = show(page, report)
    verdict = seen["sections"]["verdict"]
    assert next(iter(seen["sections"])) == "verdict"
    assert verdict["title"] == "Yes: the connector learned to see."
    for text in (
        "1.73 × as likely",  # e^0.55
        "0.55 nats a token",
        "80% (guessing: 25%)",
        "from 9.2 to 4.2 nats a token",
        "Before training, and after batch 640.",
        "finished",
    ):
        assert text in verdict["text"]
    page.resize(360)
    top = page.evaluate("document.querySelector('#verdict h2').getBoundingClientRect().bottom")
    assert top < 800, "a phone shows the headline without scrolling"


def test_captions_stand_beside_pictures(page: Page, report: Path) -> None:
    text = show(page, report)["sections"]["captions"]["text"]
    assert "cat with wry smile" in text
    assert "(word for word)" in text
    assert "<b>bold</b> & “red”" in text, "as text, not as markup"
    for batch in EVALUATIONS:
        assert (f"batch {batch}" if batch else "untrained") in text
        assert f"said at {batch}" in text


def test_facts_are_told(page: Page, report: Path) -> None:
    text = {name: s["text"] for name, s in show(page, report)["sections"].items()}
    assert "loss_spike" in text["warnings"]
    assert "1806" in text["data"]
    assert "too small" in text["data"]
    assert "9,123,456 parameters, trained, float32" in text["model"]
    assert "A CPU of tests" in text["hardware"]
    assert "2.7.0" in text["versions"]
    for fact in ("seed=17", "18", "feedbeef", "cafe01", "cafe02", "batch 451", "0123456789abcdef"):
        assert fact in text["reproducibility"]
    assert "optimizer.betas" in text["configuration"]


def test_dark_and_print(page: Page, report: Path) -> None:
    backs = set()
    for scheme in ("light", "dark"):
        page.command(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        backs.add(show(page, report)["back"])
    assert len(backs) == 2
    page.command("Emulation.setEmulatedMedia", media="print", features=[])
    printed = page.evaluate(LOOK)
    page.command("Emulation.setEmulatedMedia", media="")
    assert printed["back"] == "rgb(255, 255, 255)"
    assert all(section["seen"] for section in printed["sections"].values())
    pdf = page.print()
    assert pdf.startswith(b"%PDF-")
    assert pdf.count(b"/Type /Page\n") >= 3


HOSTILE = (
    "</style></bdi><script>document.title='owned'</script>"
    "<img src='http://127.0.0.1:9/x.png' onerror=alert(1)>\"'><svg onload=alert(2)>\u202e\x00"
)


def test_foreign_text_stays_text(page: Page, tmp_path: Path) -> None:
    """Captions, names, warnings, paths and metrics come from data and from other people."""
    name = "run\"><script>document.title='owned'<!--".replace("/", "")
    folder = tmp_path / name
    folder.mkdir()
    lines = [*metric_lines(), {"batch": 640, HOSTILE: 1.0, f"lr-{HOSTILE}": 2.0}]
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "run.json").write_text(
        json.dumps(FACTS | {"run_name": HOSTILE, "config": {HOSTILE: HOSTILE}, "commit": HOSTILE})
    )
    write_lines(
        folder / "warnings.jsonl", [{"batch": HOSTILE, "name": HOSTILE, "message": HOSTILE}]
    )
    write_captions(folder, [(HOSTILE, HOSTILE)], [0, 640])
    (tmp_path / "secret.png").write_bytes((folder / "captions/images/0.jpg").read_bytes())
    out = {"id": "out", "image": "../../secret.png", "truth": "t", "caption": HOSTILE}
    with (folder / "captions" / "ba640.jsonl").open("a") as file:
        file.write(json.dumps(out) + "\n")
    seen = show(page, write_report(folder))
    assert page.evaluate("document.title").startswith("</style>"), "its name, as text"
    assert seen["scripts"] == 0
    assert len(seen["pictures"]) == 1
    assert "leads out of the run's folder" in seen["sections"]["captions"]["text"]
    assert set(seen["sections"]) == set(SECTIONS)
    assert "<script>" in seen["sections"]["captions"]["text"]
    assert seen["overflow"] <= 0


def test_what_is_missing_is_said(page: Page, tmp_path: Path) -> None:
    """A run that has just begun, of a version that wrote nothing but metrics."""
    write_lines(tmp_path / "metrics.jsonl", [{"batch": 0, "loss/train/total": 3.0}])
    seen = show(page, write_report(tmp_path), 360)
    assert set(seen["sections"]) == set(SECTIONS)
    assert seen["sections"]["verdict"]["title"] == "It cannot be told."
    assert "callbacks.evidence" in seen["sections"]["verdict"]["text"]
    for name in ("data", "model", "time", "hardware", "versions", "reproducibility"):
        assert "run.json is not in the run's folder" in seen["sections"][name]["text"], name
    assert "callbacks.captions" in seen["sections"]["captions"]["text"]
    (loss, *others) = seen["charts"]
    assert loss["dots"] == 1
    assert loss["outside"] == 0
    assert "3 nats a token at batch 0" in loss["label"]
    assert all("Not here" in chart["text"] for chart in others)
    assert seen["overflow"] <= 0


def test_thousands_of_points_make_a_small_page(page: Page, tmp_path: Path) -> None:
    lines = metric_lines(batches=20_000, gaps={batch: 0.4 for batch in range(0, 20_001, 100)})
    lines[25_000]["loss/train/total"] = 77.0  # a spike, which must not be lost
    lines[30_000]["loss/train/total"] = float("nan")
    write_lines(tmp_path / "metrics.jsonl", lines)
    report = write_report(tmp_path)
    assert report.stat().st_size < 500_000
    seen = show(page, report)
    loss = seen["charts"][0]
    assert "greatest 77" in loss["text"] or "NaN" in "".join(loss["tooltips"])
    assert any("NaN" in tooltip for tooltip in loss["tooltips"])
    assert seen["elements"] < 6000


def test_a_real_run(page: Page, tiny_config, tmp_path: Path) -> None:
    """Tiny towers through the Trainer, then the command."""
    trainer, *_ = run(
        tiny_config(
            loggers={"jsonl": {}},
            callbacks={
                **{"lr_monitor": {}, "optimizer_monitor": {"batch_log_interval": 1}},
                **{"evidence": {"num_samples": 4, "num_choices": 2}, "captions": {"num_images": 2}},
            },
        )
    )
    trainer.close()
    done = subprocess.run(
        [sys.executable, "-m", "vlm_composer.report", tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.strip())
    assert report == tmp_path / "run" / "report.html"
    seen = show(page, report)
    charts = {chart["title"]: chart for chart in seen["charts"]}
    for title in ("Loss", "Perplexity", "Learning rate", "Gradient norm"):
        assert charts[title]["width"] > 240, title
        assert charts[title]["dots"], title
        assert charts[title]["outside"] == 0, title
