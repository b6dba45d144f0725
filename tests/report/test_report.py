"""What the report reads, judges and says, without a browser."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hostile_json import leaves, replaced
from run_folders import (
    FACTS,
    evaluation_lines,
    metric_lines,
    whole_run,
    write_captions,
    write_lines,
)
from vlm_composer.report.__main__ import main
from vlm_composer.report.axes import decimate, even_ticks, smooth
from vlm_composer.report.charts import Series, line_chart, stacked_chart
from vlm_composer.report.curves import charts_of
from vlm_composer.report.run_folder import ReportError, read_run
from vlm_composer.report.text import duration, flat, number
from vlm_composer.report.verdict import judge
from vlm_composer.report.write import write_report
from vlm_composer.training.step_parts import PARTS

ROOT = Path(__file__).parent.parent.parent


def run_of(folder: Path, lines: list[dict], **facts: object):
    write_lines(folder / "metrics.jsonl", lines)
    if facts:
        (folder / "run.json").write_text(json.dumps(FACTS | facts))
    return read_run(folder)


def test_no_folder_and_no_metrics_are_refused(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not a folder; give the run's" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "has no metrics.jsonl" in error
    assert "loggers.jsonl" in error
    assert list(tmp_path.iterdir()) == []


def test_it_goes_where_asked(tmp_path, capsys):
    folder = whole_run(tmp_path / "run")
    out = tmp_path / "there" / "page.html"
    assert main([str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    (tmp_path / "file").touch()
    assert main([str(folder), "--out", str(tmp_path / "file" / "page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_it_needs_neither_torch_nor_composer():
    code = "import sys, vlm_composer.report.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_parts_of_a_step_are_those_that_are_logged(tmp_path):
    run = run_of(tmp_path, [{"batch": 1} | {f"time/{part}": 1.0 for part in PARTS}])
    (chart,) = (
        chart for chart in charts_of(run) if "waiting for data" in chart and "<svg" in chart
    )
    for words in PARTS.values():
        assert words in chart


@pytest.mark.parametrize(
    ("gap", "ended", "headline"),
    [
        (0.5, "then", "Yes"),
        (0.5, None, "Yes"),
        (0.1, "then", "A little"),
        (0.01, "then", "No"),
        (0.01, None, "Not yet"),
        (-0.2, "then", "No"),
        (math.nan, "then", "No: the run broke"),
    ],
)
def test_the_verdict_follows_the_gap(tmp_path, gap, ended, headline):
    lines = [{"batch": 9, "loss/train/total": 4.0}, *evaluation_lines(10, gap)]
    verdict = judge(run_of(tmp_path, lines, ended=ended))
    assert verdict.headline.startswith(headline)
    assert (verdict.tone == "good") == (headline == "Yes")


def test_the_verdict_asks_retrieval_too(tmp_path):
    by_luck = {"batch": 10, "evidence/retrieval_accuracy": 0.3}  # of 32 images, chance 0.25
    verdict = judge(run_of(tmp_path, [*evaluation_lines(10, 0.5), by_luck], ended="then"))
    assert verdict.headline.startswith("Probably")


def test_the_verdict_takes_the_whole_set_where_there_is_no_evidence(tmp_path):
    lines = evaluation_lines(0, 0.0)[:2] + evaluation_lines(640, 0.4)[:2]
    verdict = judge(run_of(tmp_path, lines))
    assert verdict.headline.startswith("Yes")
    assert "the whole evaluation set" in verdict.facts[1].meaning


def test_without_comparison_nothing_is_claimed(tmp_path):
    lines = [{"batch": 5, "loss/train/total": 0.1, "metrics/eval/LanguageCrossEntropy": 0.2}]
    assert judge(run_of(tmp_path, lines)).headline == "It cannot be told."
    early = judge(run_of(tmp_path, evaluation_lines(0, 0.0)))
    assert early.headline == "It is too early to tell."


def test_a_broken_loss_is_said_first(tmp_path):
    lines = [*metric_lines(), {"batch": 640, "loss/train/total": math.inf}]
    verdict = judge(run_of(tmp_path, lines))
    assert verdict.tone == "bad"
    assert "∞" in verdict.why


def test_batches_trained_again_count(tmp_path):
    lines = [{"batch": batch, "loss/train/total": 9.0} for batch in range(6)]
    lines += [{"batch": batch, "loss/train/total": 1.0} for batch in range(3, 8)]
    run = run_of(tmp_path, lines)
    assert run.values("loss/train/total") == [
        *((batch, 9.0) for batch in range(3)),
        *((batch, 1.0) for batch in range(3, 8)),
    ]
    assert "from batch 3" in run.notes[0]


def test_samples_with_the_same_id_keep_their_own_captions(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", metric_lines(5))
    write_captions(tmp_path, [("a", "first"), ("a", "second")], [0, 4])
    lines = (tmp_path / "captions" / "ba4.jsonl").read_text().replace('"said at 4"', '"one"', 1)
    (tmp_path / "captions" / "ba4.jsonl").write_text(lines)
    captioned = read_run(tmp_path).captioned
    assert [(x.name, x.truth, x.captions[4]) for x in captioned] == [
        ("a", "first", "one"),
        ("a", "second", "said at 4"),
    ]
    assert captioned[0].picture != captioned[1].picture


def test_damaged_files_are_told_of(tmp_path):
    folder = whole_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"batch": 641, "loss/tr')
    (folder / "run.json").write_text("{")
    (folder / "warnings.jsonl").write_bytes(b"\xff\n")
    (folder / "captions" / "ba0.jsonl").write_text("no json\n")
    (folder / "captions" / "ba999.jsonl").mkdir()
    (folder / "captions" / "images" / "0.jpg").write_text("no picture")
    (folder / "captions" / "images" / "1.jpg").unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    for told in (
        "2 lines of metrics.jsonl could not be read",
        "run.json could not be read",
        "1 line of warnings.jsonl",
        "1 line of ba0.jsonl",
        "ba999.jsonl could not be read",
        "No picture: not a JPEG or PNG",
        "No picture: its file is missing",
    ):
        assert told in page


@pytest.mark.parametrize("entry", [None, [], 3, "text", {}, [None], {"a": [{"b": None}]}])
def test_facts_of_any_shape_make_a_page(tmp_path, entry):
    """`run.json` of another version of the project."""
    write_lines(tmp_path / "metrics.jsonl", metric_lines(5))
    for facts in (dict.fromkeys(FACTS, entry), entry):
        (tmp_path / "run.json").write_text(json.dumps(facts))
        assert 'id="configuration"' in write_report(tmp_path).read_text(encoding="utf-8")


NUMBERS = (-1, 10**400, 10**5000, 1.5, math.nan, -math.inf, "\ud800", "\x1b[31m", [[]], {"a": {}})
"""In place of a value; 5,000 digits are more than Python reads."""


def texts_with(document, path):
    """A document with each of NUMBERS in place of a part, as text."""
    for value in NUMBERS:
        digits = "9" * 5000 if value == 10**5000 else None
        text = json.dumps(replaced(document, path, "DIGITS" if digits else value))
        yield text.replace('"DIGITS"', digits) if digits else text


@pytest.mark.parametrize("path", [p for p in leaves(FACTS) if p[:1] not in [("config",)]], ids=str)
def test_a_value_of_run_json_that_nobody_writes_makes_a_page(tmp_path, path):
    write_lines(tmp_path / "metrics.jsonl", metric_lines(5))
    for text in texts_with(FACTS, path):
        (tmp_path / "run.json").write_text(text)
        assert 'id="configuration"' in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["metrics.jsonl", "warnings.jsonl", "captions/ba0.jsonl"])
def test_a_line_that_nobody_writes_makes_a_page(tmp_path, file):
    folder = whole_run(tmp_path / "run")
    lines = (folder / file).read_text().splitlines()
    for path in leaves(json.loads(lines[-1])):
        for text in texts_with(json.loads(lines[-1]), path):
            (folder / file).write_text("\n".join([*lines[-5:-1], text]))
            assert 'id="configuration"' in write_report(folder).read_text(encoding="utf-8")


def test_a_run_json_that_cannot_be_used_is_noted_in_a_line(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", metric_lines(5))
    for text in texts_with(FACTS, ("seeds", "seed")):
        (tmp_path / "run.json").write_text(text)
        notes = [note for note in read_run(tmp_path).notes if "run.json" in note]
        unusable = "9" * 400 in text or "ud800" in text or "0" * 400 in text
        assert [bool(notes), len(notes) < 2 and "\n" not in "".join(notes)] == [unusable, True]


def test_a_run_without_metrics_makes_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "metrics.jsonl holds no metric yet" in page
    with pytest.raises(ReportError, match="not a folder"):
        read_run(tmp_path / "metrics.jsonl")


def test_decimation_keeps_peaks_ends_and_nan():
    points = [(x, math.sin(x / 50)) for x in range(10_000)]
    points[4321] = (4321, 99.0)
    points[7000] = (7000, -99.0)
    points[8000] = (8000, math.nan)
    kept = decimate(points, 200)
    assert len(kept) <= 210
    assert {points[0], points[4321], points[7000], points[-1]} <= set(kept)
    assert any(math.isnan(y) for _, y in kept)
    assert kept == sorted(kept, key=lambda point: point[0])
    assert decimate(points[:50], 200) == points[:50]


def test_a_running_mean_leaves_out_what_is_no_number():
    assert smooth([(0, 1.0), (1, math.nan), (2, 3.0), (3, 5.0)], 2) == [(0, 1), (2, 2), (3, 4)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.001, 0.0011), (-3, 1e6), (5, 7)])
def test_ticks_are_round_and_within(low, high):
    ticks = even_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0], [2.0, 2.0], [math.nan], [math.inf, 1.0], [1e-9, 1e9], [-5.0, 5.0], [1e300, 1.0]],
)
def test_any_values_make_a_chart(values):
    points = list(enumerate(values))
    chart = line_chart("Loss", [Series("loss", points)])
    bars = stacked_chart("Step", {"a": points, "b": points[:1]})
    assert "<svg" in chart
    places = re.findall(r' (?:d|x|y|cx|cy|width|height)="([^"]*)"', chart + bars)
    assert len(places) > 10
    assert not [place for place in places if "n" in place or place.startswith("-")]


def test_numbers_are_short():
    assert [number(x) for x in (0, 3.14159, 1234.5, 0.00012, -2.5, 1e9, math.nan, -math.inf)] == [
        "0",
        "3.14",
        "1,234",
        "1.2e−4",
        "−2.5",
        "1e9",
        "NaN",
        "−∞",
    ]
    assert duration(90) == "90 s"
    assert duration(600) == "10.0 minutes"


def test_a_document_becomes_pairs():
    assert dict(flat({"a": {"b": [1, 2], "c": None, "d": True}, "e": [{"f": 12345}]})) == {
        "a.b": "1, 2",
        "a.c": "–",
        "a.d": "yes",
        "e[0].f": "12,345",
    }
