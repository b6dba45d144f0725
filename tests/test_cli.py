"""The command `vlm-composer`, as processes, and what a built package has of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from composer.cli import launcher as upstream
from PIL import Image

from run_folders import whole_run
from vlm_composer import launcher
from vlm_composer.cli import COMMANDS
from vlm_composer.config import TrainConfig
from vlm_composer.training.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "convert": "json parquet webdataset sources images out workers engine eval-ratio max-samples "
    "seed max-reject-ratio drop-duplicates overwrite",
    "inspect": "side samples seed out",
    "verify": "workers",
    "preview": "json parquet webdataset sources images yaml tokenizer count seed",
    "features": "out dtype device batch-size overwrite dry-run",
    "train": "preflight nproc world_size node_rank base_rank master_addr master_port stdout stderr "
    "verbose",
    "plan": "prompt-tokens answer-tokens gpus gpus-per-node device mfu json",
    "report": "out",
    "export": "out yaml with-towers dtype prompt",
    "caption": "prompt batch-size max-new-tokens device dtype vision-tower language-model out",
    "demo": "seed prepare-only",
}
OPTIONS["preflight"] = OPTIONS["train"]


def run(*arguments, code="-m vlm_composer.cli", folder=ROOT, path=ROOT):
    environment = os.environ | {"PYTHONPATH": str(path), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *code.split(" ", 1), *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_its_help_lists_every_command_and_imports_none():
    code = (
        "-c import sys; from vlm_composer.cli import main\n"
        "try: main()\n"
        "finally: print({name.split('.')[0] for name in sys.modules})"
    )
    done = run("--help", code=code)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^    ([a-z]+)\s", done.stdout, re.M) == list(COMMANDS) == [
        *("convert", "inspect", "verify", "preview", "features", "train", "preflight", "plan"),
        *("report", "export", "caption", "demo"),
    ]  # fmt: skip
    imported = done.stdout.splitlines()[-1]
    assert "'vlm_composer'" in imported
    for name in ("torch", "composer", "streaming", "transformers", "PIL", "convert", "jinja2"):
        assert f"'{name}'" not in imported


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_complete(command):
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: vlm-composer {command} ")
    options = {*re.findall(r"^  (?:-\w(?: \w+)?, )?--([\w-]+)", done.stdout, re.M)} - {"help"}
    assert options == {*OPTIONS[command].split()}
    if command in ("train", "preflight"):
        for section in ("vision_tower", "language_model", "connector", "optimizer", "callbacks"):
            assert re.search(rf"^  {section} +[A-Z'].{{10}}", done.stdout, re.M), section
        assert "docs/config.md" in done.stdout


def test_an_unknown_command_names_the_nearest():
    for given, nearest in (("trian", "train"), ("conver", "convert"), ("x", "export")):
        done = run(given, "--help")
        assert done.returncode == 2
        assert f"unknown command {given!r}; did you mean {nearest!r}?" in done.stderr
    assert "the following arguments are required: COMMAND" in run().stderr


def test_a_mistake_is_of_the_command():
    done = run("report", "--ou", "x", "a", "b")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: vlm-composer report ")
    assert "vlm-composer report: error: unrecognized arguments: b" in done.stderr
    for command in ("train", "preflight"):
        done = run(command, "-n", 2)
        assert done.returncode == 2
        assert (
            f"vlm-composer {command}: error: the following arguments are required: YAML\n"
            in done.stderr
        )


def test_overrides_may_follow_options():
    overrides = "seed=3", "--json", "connector.vision_ln=true"
    done = run("plan", "yamls/stage1.yaml", "--gpus", 8, *overrides)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpus"] == 8
    done = run("plan", "yamls/stage1.yaml", "--json", "seeds=3")
    assert done.returncode == 1
    assert "seeds: unknown key; did you mean 'seed'?" in done.stderr


def test_a_conversion_and_a_look_at_it(tmp_path):
    items = []
    for number in range(20):
        Image.new("RGB", (40, 30), (number, 0, 99)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"No. {number}"}]
        items.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "pairs.json").write_text(json.dumps(items))
    source = ("--json", "pairs.json", "--images", ".", "--out", "out")
    done = run("convert", *source, "--eval-ratio", 0.1, "--workers", 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("18 train and 2 eval samples in out")
    assert "all well" in run("verify", "out", folder=tmp_path).stdout
    done = run("inspect", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "inspect.html").read_text(encoding="utf-8").count("<figure>") == 16
    assert "give --overwrite" in run("convert", *source, folder=tmp_path).stderr


def test_every_option_of_the_launcher_is_known():
    """Composer may add one; those left out choose what it starts, which is train.py."""
    left_out = {"help", "version", "module_mode", "command_mode"}
    left_out |= {"training_script", "training_script_args"}
    known = {action.dest for action in upstream._get_parser()._actions} - left_out
    assert known == {*launcher.LAUNCHER_OPTIONS, "verbose"}


@pytest.mark.slow
def test_training_on_two_ranks(tiny_yaml, tmp_path):
    path = tiny_yaml(loggers={"jsonl": {}}, device_train_microbatch_size=2)
    done = run("train", "-n", 2, path, "max_duration=2ba", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(TrainConfig.read(path).run_folder)
    assert len(read_metrics(folder / "metrics.jsonl")["loss/train/total"]) == 2
    assert json.loads((folder / "run.json").read_text())["hardware"]["ranks"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", [["preflight"], ["train", "--preflight"]])
def test_preflight(tiny_yaml, command):
    done = run(*command, tiny_yaml(), "--nproc", 1, "max_durations=3ep")
    assert done.returncode == 1
    assert "max_durations: unknown key; did you mean 'max_duration'?" in done.stdout
    assert "\nPreflight: 1 check, 1 failure\n" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_built_package_has_the_script_and_the_templates(tmp_path):
    """As setuptools builds a wheel: from a copy, which it writes into."""
    for name in ("vlm_composer", "convert"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    build = "import setuptools; setuptools.setup()"
    built = tmp_path / "built"
    arguments = ("egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", built)
    done = run(*arguments, code=f"-c {build}", folder=tmp_path / "source", path="")
    assert done.returncode == 0, done.stderr
    sources = {*ROOT.glob("*/**/*.jinja"), *(ROOT / "vlm_composer").glob("**/*.css")}
    for source in sources:
        assert (built / source.relative_to(ROOT)).read_bytes() == source.read_bytes()
    assert len(sources) == 5

    (script,) = PathDistribution(tmp_path / "vlm_composer.egg-info").entry_points
    assert (script.group, script.name) == ("console_scripts", "vlm-composer")
    start = f"-c import sys; from {script.module} import {script.attr}; sys.exit({script.attr}())"
    page = tmp_path / "page.html"
    folder = whole_run(tmp_path / "run")
    done = run("report", folder, "--out", page, code=start, folder=tmp_path, path=built)
    assert done.returncode == 0, done.stderr
    assert "Yes: the connector learned to see." in page.read_text(encoding="utf-8")
