"""Checkpoints of something else, damaged ones and hostile ones are refused, and run nothing."""

import contextlib
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints import HOLD, folder_of, newest
from runs import run, start
from vlm_composer.preflight.report import PreflightError
from vlm_composer.training.checkpoint_file import (
    CheckpointError,
    CheckpointFile,
    write_checkpoint,
)
from vlm_composer.training.checkpoint_folder import open_named
from vlm_composer.training.checkpoint_schema import WEIGHTS


def altered(config, change=None, document=None):
    """A copy of the newest checkpoint with other tensors or another document, otherwise valid."""
    checkpoint = newest(config)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    if change is not None:
        change(tensors)
    path = checkpoint.path.with_name("altered.safetensors")
    write_checkpoint(path, tensors, checkpoint.document | (document or {}))
    return str(path)


@pytest.fixture
def trained(tiny_config):
    config = tiny_config(**HOLD)
    run(config)
    return config


def parts_of(weight, shape=(1,)):
    """A weight as a whole checkpoint has it: with its moments and the number of its steps."""
    moments = {f"optimizer.{m}.{weight}": torch.zeros(shape) for m in ("exp_avg", "exp_avg_sq")}
    step = {f"optimizer.step.{weight}": torch.tensor(2.0)}
    return {WEIGHTS + weight: torch.ones(shape), **moments, **step}


LATENTS = "connector.resampler.latents"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: [t.pop(name) for name in parts_of(LATENTS)],
            r"lacks 1 of \d+ .*latents.* holds 0",
        ),
        (
            lambda t: t.update(parts_of("connector.extra")),
            r"lacks 0 .* holds 1 others .*connector\.extra",
        ),
        (
            lambda t: t.update(parts_of(LATENTS, (3, 2))),
            r"latents has shape \(3, 2\), this run's has \(4, 32\)",
        ),
    ],
)
def test_a_checkpoint_of_another_connector_is_refused(trained, tiny_config, change, message):
    with pytest.raises(CheckpointError, match=message):
        start(tiny_config(load_path=altered(trained, change)))


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("language_model", {"name": "qwen3", "pretrained": False}, "weights_hash {ours} "),
        ("vision_tower", {"name": "siglip", "dtype": "bf16"}, "dtype float32 .*bfloat16"),
        ("vision_tower", {"name": "siglip", "layer": -2}, "config_hash"),
    ],
)
def test_towers_that_differ_are_refused(trained, tiny_config, towers, key, changes, message):
    tower = {"dtype": "fp32", **changes, "name": str(towers / changes["name"])}
    ours = newest(trained).document["towers"][key]["weights_hash"]
    config = tiny_config(load_path=str(folder_of(trained)), load_weights_only=True, **{key: tower})
    with pytest.raises(CheckpointError, match=f"another {key}: " + message.format(ours=ours)):
        start(config)


def test_other_data_are_refused_but_for_the_weights_alone(trained, tiny_config, shards):
    other = {"dataset": {"local": str(shards / "eval"), "shuffle": True}, "num_workers": 0}
    changes = {"train_loader": other | {"drop_last": False}, "load_path": newest(trained)}
    changes["load_path"] = str(changes["load_path"].path)
    with pytest.raises(CheckpointError, match=r"other data: index_.*, samples: 40 became 7;"):
        start(tiny_config(**changes))
    trainer, vlm, _ = start(tiny_config(**changes, load_weights_only=True))
    assert trainer.state.timestamp.batch == 0
    saved = newest(trained).weights()["connector.resampler.latents"]
    assert torch.equal(vlm.connector.resampler.latents, saved)


def test_settings_that_changed_are_told(trained, tiny_config, capsys):
    path = str(folder_of(trained))
    start(tiny_config(load_path=path, optimizer={"lr": 2e-3}, max_duration="9ba"))
    lines = [x for x in capsys.readouterr().err.splitlines() if "another setting" in x]
    assert len(lines) == 2
    assert lines[0].endswith("max_duration: 4ba became 9ba")
    assert lines[1].endswith("optimizer.lr: 0.001 became 0.002")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def composer_file(folder, marker, *, pickled):
    """A checkpoint that stock Composer loads, and what it says runs."""
    code = f"__builtins__['__import__']('os').mkdir({str(marker)!r})"
    state = {"algorithms": [("BlurPool", {"repr": code})], "model": {}}
    if pickled:
        state = {"run_name": Payload(str(marker))}
    torch.save({"state": state, "rng": None}, folder / "evil.pt")
    return folder / "evil.pt"


def composer_loads(path):
    from composer import Trainer
    from composer.models import ComposerClassifier

    model = ComposerClassifier(torch.nn.Linear(1, 2), num_classes=2)
    Trainer(model=model, load_path=str(path), progress_bar=False, device="cpu")


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
def test_a_hostile_checkpoint_runs_nothing(tiny_config, tmp_path, pickled, name):
    marker = tmp_path / "ran"
    path = composer_file(tmp_path, marker, pickled=pickled).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match="is not a checkpoint of vlm_composer"):
        start(tiny_config(load_path=str(path)))
    assert not marker.exists()
    with contextlib.suppress(ValueError):  # of what the payload gave, once it had run
        composer_loads(path)
    assert marker.exists(), "the payload is a real one"


def test_hostile_sharded_metadata_runs_nothing(tiny_config, tmp_path):
    import pickle

    from torch.distributed.checkpoint import FileSystemReader

    marker, folder = tmp_path / "ran", tmp_path / "sharded"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(str(marker))))
    with pytest.raises(PreflightError, match="holds no checkpoint"):
        start(tiny_config(load_path=str(folder)))
    assert not marker.exists()
    with pytest.raises(AttributeError):  # of what the payload gave, once it had run
        FileSystemReader(folder).read_metadata()
    assert marker.exists(), "the payload is a real one"


@pytest.mark.parametrize("content", [b"", b"nonsense", b'\x08\0\0\0\0\0\0\0{"a":1}'])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint of vlm_composer"):
        open_named(str(tmp_path / "x.safetensors"), tmp_path)


def test_a_safetensors_file_of_someone_else_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"vlm_composer": "{}"})
    with pytest.raises(CheckpointError, match="is not a checkpoint of vlm_composer"):
        CheckpointFile(tmp_path / "x.safetensors")


def test_a_document_that_was_altered_is_refused(trained):
    path = newest(trained).path
    data = path.read_bytes()
    old, new = b'\\"max_duration\\": \\"4ba', b'\\"max_duration\\": \\"5ba'
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with safe_open(path, "pt") as file:
        assert "5ba" in file.metadata()["vlm_composer"]
    with pytest.raises(CheckpointError, match="is damaged"):
        CheckpointFile(path)
