"""The command line, as its user meets it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convert import __main__ as cli
from convert.writer import ShardWriter


def test_a_conversion(pairs: Any) -> None:
    pairs.add(50)
    command = [sys.executable, "-m", "convert", "--json", str(pairs.write_json())]
    command += ["--images", str(pairs.images), "--out", str(pairs.out)]
    command += ["--eval-ratio", "0.1", "--max-samples", "20", "--seed", "3"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"18 train and 2 eval samples in {pairs.out}")
    for part in ("20/20", "samples/s", "<00:00"):  # progress, rate and time left
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((pairs.out / "summary.json").read_text())["train"] == 18
    assert len(pairs.ids("train")) == 18


def test_the_help_lists_the_tools() -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "convert", *arguments, "--help"]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
        )
        return done.stdout

    tools = re.findall(r"^  python -m convert (\w+) +\w", said(), re.M)
    assert tools == ["inspect", "verify", "preview", "features"] == [*cli.TOOLS]
    for tool in tools:
        assert re.match(rf"usage: python -m convert[ .]{tool} \[-h\]", said(tool))


def test_a_folder_for_sockets_with_too_long_a_path(pairs: Any, tmp_path: Path) -> None:
    pairs.add(1100)  # two partitions, which take two workers
    long = tmp_path / ("long" * 25)
    long.mkdir()
    command = [sys.executable, "-m", "convert", "--json", str(pairs.write_json())]
    command += ["--images", str(pairs.images), "--out", str(pairs.out)]
    for workers, status in (("2", 1), ("1", 0)):
        done = subprocess.run(
            [*command, "--workers", workers],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TMPDIR": str(long)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert ("set TMPDIR to a shorter one" in done.stderr) == bool(status)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_it_goes_without_torch(pairs: Any, tmp_path: Path, command: str) -> None:
    """It takes seconds to import, in each process that does."""
    pairs.add(5)
    arguments = ["--json", str(pairs.write_json()), "--images", str(pairs.images)]
    arguments += ["--out", str(pairs.out)]
    if command != "convert":
        pairs.convert()
        arguments = [command, str(pairs.out)]
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['convert', *{arguments!r}]\n"
        "try:\n"
        "    runpy.run_module('convert', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert not {'torch', 'streaming'} & {*sys.modules}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def run_here(pairs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process; returns its status and what it says on stderr."""

    def run_main(*options: str, **replaced: str) -> tuple[int, str]:
        settings = {"json": pairs.json_path, "images": pairs.images, "out": pairs.out, **replaced}
        argv = ["convert", *options]
        for name, value in settings.items():
            argv += [f"--{name}", str(value)]
        monkeypatch.setattr(sys, "argv", argv)
        status = cli.main()
        return status, capsys.readouterr().err.splitlines()[-1]

    return run_main


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("[{]", "not valid JSON"),
        ("[1, 2", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[" + "9" * 5000 + "]", "not valid JSON"),
        ("\x80", "not valid JSON"),
        ("{}", "holds a dict, not a list"),
        ("null", "holds a NoneType, not a list"),
        ("[]", "holds an empty list"),
    ],
)
def test_a_source_that_is_no_list(pairs: Any, run_here: Any, text: str, problem: str) -> None:
    pairs.json_path.write_bytes(text.encode("latin-1"))
    status, message = run_here()
    assert status == 1
    assert message.startswith(f"convert: {pairs.json_path} ")
    assert problem in message
    assert not pairs.out.exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--eval-ratio", "1"], "eval_ratio is 1.0"),
        (["--eval-ratio", "-1"], "eval_ratio is -1.0"),
        (["--eval-ratio", "nan"], "eval_ratio is nan"),
        (["--max-samples", "0"], "max_samples is 0, and the source has 3 items"),
        (["--max-samples", "4"], "max_samples is 4, and the source has 3 items"),
        (["--seed", "-1"], "seed is -1"),
        (["--max-reject-ratio", "nan"], "max_reject_ratio is nan"),
        (["--max-reject-ratio", "1.01"], "max_reject_ratio is 1.01"),
    ],
)
def test_settings_out_of_range(pairs: Any, run_here: Any, options: list[str], problem: str) -> None:
    pairs.add(3)
    pairs.write_json()
    status, message = run_here(*options)
    assert status == 1
    assert problem in message
    assert not pairs.out.exists()


def test_too_many_rejects(pairs: Any, run_here: Any) -> None:
    pairs.add(8)
    pairs.add(2, image="../outside.jpg")
    pairs.write_json()
    status, message = run_here()
    assert status == 1
    assert message.startswith("convert: 2 of 10 samples were rejected (2 outside_images_root)")
    assert pairs.files() == ["rejects.jsonl"]


def test_paths_that_cannot_be(pairs: Any, run_here: Any) -> None:
    pairs.add(3)
    path = str(pairs.write_json())
    for replaced, problem in (
        ({"json": path + "x"}, "No such file"),
        ({"json": str(pairs.images)}, "Is a directory"),
        ({"images": path}, "no such folder"),
        ({"images": path + "x"}, "no such folder"),
        ({"out": path}, "pairs.json is no folder, or lies in a file"),
        ({"out": path + "/below"}, "below is no folder, or lies in a file"),
        ({"out": "/proc/nothing"}, "No such file"),
        ({"out": "s3:///prefix"}, "give s3://bucket/prefix"),
    ):
        status, message = run_here(**replaced)
        assert status == 1
        assert problem in message


def test_interrupted(pairs: Any, run_here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.add(30)
    pairs.write_json()
    write = ShardWriter.write

    def interrupted(writer: ShardWriter, record: Any) -> None:
        if writer.num_samples == 20:
            raise KeyboardInterrupt
        write(writer, record)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", interrupted)
        status, message = run_here("--workers", "1")
    assert status == 130
    assert message == (
        f"convert: interrupted: {pairs.out} is not complete; rerun the command to resume"
    )
    assert run_here("--workers", "1")[0] == 0
    assert len(pairs.ids("train")) == 29


def test_sources_of_a_file(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.add(20)
    sources = pairs.folder / "sources.yaml"
    entry = f"json: {pairs.write_json()}, images: {pairs.images}"
    sources.write_text(f"- {{name: one, {entry}}}\n- {{name: two, {entry}}}\n")
    command = ["convert", "--sources", str(sources), "--out", str(pairs.out), "--eval-ratio", "0"]
    monkeypatch.setattr(sys, "argv", command)
    assert cli.main() == 0
    summary = json.loads((pairs.out / "summary.json").read_text())
    assert [counts["train"] for counts in summary["sources"].values()] == [20, 20]
    assert (pairs.out / "two" / "train" / "index.json").exists()

    monkeypatch.setattr(sys, "argv", [*command, "--images", str(pairs.images)])
    assert cli.main() == 1
