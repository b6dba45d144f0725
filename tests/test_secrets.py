"""What a yaml takes from the environment is used, and recorded nowhere."""

import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from runs import start
from vlm_composer.config import TrainConfig
from vlm_composer.config.loader import ConfigError
from vlm_composer.export.__main__ import main as export
from vlm_composer.report.__main__ import main as report
from vlm_composer.training.checkpoint_file import CheckpointFile

SECRET = "hunter2-and-more"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("SEED", "23")


@pytest.fixture
def with_secrets(tiny_yaml, tmp_path, monkeypatch):
    """A yaml that takes texts, parts of texts, numbers and whole sections from the environment."""

    def write(**changes):
        monkeypatch.setenv("FOLDER", str(tmp_path))
        path = tiny_yaml(save_folder="${oc.env:FOLDER}/checkpoints", autoresume=True, **changes)
        content = OmegaConf.load(path)
        content.variables = {
            "token": "${oc.env:TOKEN}",
            "nested": {"list": ["a", "x-${variables.token}-y"]},
            "copy": "${variables.nested}",
            "name": "TOKEN",
            "inner": "${oc.env:${variables.name}}",
            "default": "${oc.env:NOTHING,${variables.token}}",
            "plain": "${variables.name}",
        }
        content.seed = "${oc.decode:${oc.env:SEED}}"
        OmegaConf.update(content, "loggers.wandb", {"tags": ["${oc.env:TOKEN}"]}, force_add=True)
        OmegaConf.save(content, path)
        return path

    return write


def test_values_are_used_and_their_texts_recorded(with_secrets):
    config = TrainConfig.read(with_secrets())
    assert config.variables["token"] == config.variables["inner"] == SECRET
    assert config.variables["copy"] == {"list": ["a", f"x-{SECRET}-y"]}
    assert config.seed == 23
    recorded = config.recorded()
    assert SECRET not in json.dumps(recorded)
    assert recorded["variables"]["token"] == "${oc.env:TOKEN}"
    assert recorded["variables"]["nested"]["list"][1] == "x-${oc.env:TOKEN}-y"
    assert recorded["variables"]["plain"] == "TOKEN"
    assert recorded["save_folder"] == "${oc.env:FOLDER}/checkpoints"
    assert recorded["seed"] == 23
    assert "unresolved" not in recorded
    assert recorded["loggers"]["wandb"]["tags"] == ["${oc.env:TOKEN}"]


def test_what_cannot_be_resolved_apart_is_recorded_as_it_stands(with_secrets):
    path = with_secrets()
    two = "variables.two=${oc.decode:${oc.env:NOTHING,${oc.env:TOKEN}}}"
    recorded = TrainConfig.read(path, [two]).recorded()
    assert SECRET not in json.dumps(recorded)
    assert recorded["variables"]["copy"] == "${variables.nested}"


def test_the_texts_are_no_key_of_a_yaml(tiny_yaml):
    with pytest.raises(ConfigError, match="unresolved: unknown key"):
        TrainConfig.read(tiny_yaml(), ["unresolved={}"])


def test_nothing_that_a_run_writes_has_the_secret(with_secrets, tmp_path):
    path = with_secrets(max_duration="2ba", loggers={"jsonl": {}})
    # A process of its own: what W&B has begun in it cannot be undone.
    code = "import sys; from vlm_composer import train; sys.exit(train.main(sys.argv[1:]))"
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    assert "token: ${oc.env:TOKEN}" in done.stderr
    assert SECRET not in done.stderr + done.stdout
    assert report([str(tmp_path / "run")]) == 0
    written = [p for p in tmp_path.rglob("*") if p.is_file() and "wandb" not in p.parts]
    assert {"run.json", "report.html", "latest"} <= {p.name for p in written}
    for file in written:
        assert SECRET.encode() not in file.read_bytes(), file
    (saved,) = (tmp_path / "checkpoints").glob("ep*")
    settings = CheckpointFile(saved).document["settings"]
    assert settings["variables"]["inner"] == "${oc.env:TOKEN}"


def test_mistakes_do_not_show_the_value(with_secrets):
    with pytest.raises(ConfigError) as error:
        TrainConfig.read(with_secrets(), ["max_duration=${oc.env:TOKEN}", "seed=${oc.env:TOKEN}"])
    assert SECRET not in str(error.value)
    assert "seed: expected a whole number, got '${oc.env:TOKEN}'" in str(error.value)


def test_a_changed_value_is_no_changed_setting_but_its_text_is(with_secrets, caplog, monkeypatch):
    trainer, _, _ = start(
        TrainConfig.read(with_secrets(max_duration="2ba"), ["loggers.wandb=null"])
    )
    trainer.fit()
    trainer.close()
    monkeypatch.setenv("TOKEN", "another")
    start(TrainConfig.read(with_secrets(max_duration="3ba"), ["loggers.wandb=null"]))
    assert "TOKEN" not in caplog.text
    assert SECRET not in caplog.text


def test_an_export_takes_nothing_from_the_environment_that_a_checkpoint_names(
    tiny_yaml, tmp_path, towers, monkeypatch, capsys
):
    monkeypatch.setenv("LLM", str(towers / "qwen3"))
    path = tiny_yaml(save_folder=str(tmp_path / "save"), max_duration="1ba")
    overrides = ["language_model.name=${oc.env:LLM}"]
    trainer, _, _ = start(TrainConfig.read(path, overrides))
    trainer.fit()
    trainer.close()
    assert export([str(tmp_path / "save"), "--out", str(tmp_path / "export")]) == 1
    said = capsys.readouterr().err
    assert "took ${oc.env:LLM} from its environment" in said
    assert "give the run's yaml with --yaml" in said
