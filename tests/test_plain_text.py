"""What others wrote reaches a terminal and a log as text: no escape codes, no lines of its own."""

import ast
import io
import logging
from pathlib import Path

import convert
import vlm_composer
from convert import convert_llava, verify
from tiny import write_pairs
from vlm_composer import train
from vlm_composer.plain_text import PlainFormatter, plain, plain_lines, say
from vlm_composer.preflight.finding import Finding
from vlm_composer.preflight.report import describe

HOSTILE = "\x1b[2J\x9b31m\u202ex\x00\r\x08\n12:00:00 INFO all well\nerror: none\u2028x\x7f"


def is_plain(text):
    return all(line.isprintable() for line in text.split("\n"))


def test_a_text_becomes_one_line():
    assert is_plain(plain(HOSTILE))
    assert "\n" not in plain(HOSTILE)
    assert plain("猫 – é 🐈") == "猫 – é 🐈"
    assert plain("abcdef", 4) == "abc…"


def test_no_line_of_a_message_but_the_first_begins_at_the_margin():
    shown = plain_lines(f"first {HOSTILE}\n  - second\nthird")
    assert is_plain(shown)
    first, *others = shown.split("\n")
    assert first.startswith("first \\x1b[2J")
    assert all(line.startswith(" ") for line in others)
    assert "  - second" in others


def test_a_log_record_cannot_pass_for_two():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger = logging.Logger("of a test")
    logger.addHandler(handler)
    logger.warning("sample %s is bad", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("it failed")
    lines = stream.getvalue().splitlines()
    assert all(line.isprintable() for line in lines)
    at_margin = [line for line in lines if not line.startswith(" ")]
    assert [line.split(" ", 2)[1] for line in at_margin] == ["WARNING", "ERROR"]


def test_say_goes_to_stderr(capsys):
    say(ValueError(HOSTILE))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == plain_lines(HOSTILE) + "\n"


def test_a_preflight_shows_names_as_text():
    shown = describe({"shards": [Finding("warning", f"a {HOSTILE}", f"b {HOSTILE}")]})
    assert is_plain(shown)
    assert not [line for line in shown.split("\n") if line.startswith(("12:00", "error"))]


def test_a_sample_of_a_hostile_id_ends_a_run_in_one_line(tiny_yaml, tmp_path, capsys):
    from streaming import MDSWriter

    columns = {"id": "str", "image": "bytes", "prompt": "str", "answer": "str"}
    with MDSWriter(out=str(tmp_path / "bad"), columns=columns, hashes=["xxh64"]) as writer:
        for _ in range(8):
            writer.write({"id": HOSTILE, "image": b"none", "prompt": "<image>", "answer": "a"})
    loader = {"dataset": {"local": str(tmp_path / "bad")}, "num_workers": 0}
    assert train.main([str(tiny_yaml(train_loader=loader))]) == 1
    err = capsys.readouterr().err
    assert "not a readable image" in err
    assert is_plain(err.replace("\r", ""))
    assert not [x for x in err.split("\n") if x.startswith(("12:00:00 INFO", "error: none"))]


def test_verify_reports_hostile_names_as_text(tmp_path, capsys):
    pairs, images = write_pairs(tmp_path / "pairs", 8)
    out = tmp_path / "mds"
    convert_llava(pairs, images, out, eval_ratio=0, show_progress=False)
    (out / "train" / "stray\x1b[2J\nfile").write_text("x")
    assert verify.main([str(out)]) == 1
    said, _ = capsys.readouterr()
    assert "stray\\x1b[2J" in said
    assert is_plain(said)


def test_nothing_else_prints_to_a_terminal_what_it_was_given():
    """Messages go through `say`; what is printed otherwise is named here."""
    allowed = {
        *("plain_text.py", "model_card.py", "caption.py", "command.py", "feature_plan.py"),
        *("plan.py", "inspect.py", "preview.py", "feature_pass.py"),
    }
    for root in (Path(next(iter(p.__path__))) for p in (vlm_composer, convert)):
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                    to = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert to.get("file") != "sys.stderr" or path.name == "plain_text.py", path
                    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                    assert path.name in allowed or "error" not in names, path
