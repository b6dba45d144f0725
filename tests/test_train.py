"""The command that users type, through the real launcher."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_composer import train
from vlm_composer.training.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
LAUNCHER = Path(sys.executable).with_name("composer")


def launch(yaml, *overrides, ranks=1, python=False, **environment):
    launcher = [sys.executable] if python else [LAUNCHER, "-n", str(ranks)]
    return subprocess.run(
        [*launcher, ROOT / "vlm_composer" / "train.py", yaml, *overrides],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
    )


@pytest.mark.slow
def test_a_run_from_yaml_to_checkpoint(tiny_yaml, tmp_path):
    path = tiny_yaml(
        max_duration="2ep",
        save_folder="{run_folder}/checkpoints",
        autoresume=True,
        eval_first=True,
        loggers={"jsonl": {}, "wandb": {"project": "tests"}},
        callbacks={"lr_monitor": {}, "speed_monitor": {"window_size": 2}, "speed_report": {}},
        log_to_console=True,
    )
    clean = {"WANDB_API_KEY": "", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    done = launch(path, "optimizer.lr=2e-3", **clean)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"

    # The log says what is trained and what is not, and how fast it was.
    for pattern in (
        r"run_name: tiny",
        r"vision_tower\s+frozen\s+[\d,]+ parameters, float32",
        r"resampler\s+trained\s+[\d,]+ parameters, float32",
        r"projector\s+trained\s+[\d,]+ parameters, float32",
        r"llm\s+frozen\s+[\d,]+ parameters, float32",
        r"Average step time .* samples/s; one epoch of 40 samples",
        r"lr: 0\.002",
        r"W&B: no API key was found .* offline",
    ):
        assert re.search(pattern, done.stderr), pattern

    metrics = read_metrics(run / "metrics.jsonl")
    losses = [value for _, value in metrics["loss/train/total"]]
    assert len(losses) == 10
    evaluations = [value for _, value in metrics["metrics/eval/LanguageCrossEntropy"]]
    assert len(evaluations) == 3
    assert evaluations[-1] < evaluations[0]
    assert {"throughput/samples_per_sec", "throughput/device/mfu"} <= metrics.keys()
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))

    # The same command again has nothing left to do, and says so by ending at once and well.
    again = launch(path, "optimizer.lr=2e-3", **clean)
    assert again.returncode == 0, again.stderr
    assert len(read_metrics(run / "metrics.jsonl")["loss/train/total"]) == 10


@pytest.mark.slow
def test_two_ranks_see_the_same_samples_as_one(tiny_yaml, tmp_path):
    losses = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        path = tiny_yaml(
            loggers={"jsonl": {}}, run_folder=str(folder), device_train_microbatch_size=2
        )
        done = launch(path, ranks=ranks)
        assert done.returncode == 0, done.stderr + done.stdout
        metrics = read_metrics(folder / "metrics.jsonl")
        losses.append([value for _, value in metrics["metrics/eval/LanguageCrossEntropy"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_mistake_ends_the_launch_with_its_line(tiny_yaml):
    done = launch(tiny_yaml(), "max_durations=3ep", "vision_tower.name=/nowhere", "seed=x")
    assert done.returncode == 1
    assert "2 mistakes" in done.stderr
    assert "max_durations: unknown key; did you mean 'max_duration'?" in done.stderr
    assert "seed: expected a whole number, got 'x'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_loader.dataset.local=/nowhere", "/nowhere holds no MDS shards (no index.json)"),
        ("global_train_batch_size=64", "an epoch of 40 samples is less than one batch of 64"),
        ("vision_tower.name=/nowhere", "/nowhere"),
        ("language_model.tokenizer=/nowhere", "/nowhere"),
        ("vision_tower.layer=9", "hidden states -4 to 3"),
        ("load_path=/nowhere/x.pt", "/nowhere/x.pt"),
        ("language_model.name={towers}/siglip", "siglip"),
    ],
)
def test_parts_that_do_not_fit_are_told_in_one_line(tiny_yaml, towers, capsys, override, message):
    assert train.main([str(tiny_yaml()), override.format(towers=towers)]) == 1
    error = capsys.readouterr().err
    assert "error on rank 0: " in error
    assert message in error


def test_the_help_says_how_it_is_called(capsys):
    assert train.main(["--help"]) == 0
    assert "composer vlm_composer/train.py yamls/stage1.yaml" in capsys.readouterr().out
