"""Checkpoints hold what is trained, load anywhere, strictly, and run nothing."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from composer.core import Callback
from composer.utils import dist
from safetensors import safe_open
from safetensors.torch import save_file

from runs import run, start
from vlm_composer.assembly import assemble_model, assemble_template
from vlm_composer.training.checkpoint_file import (
    WEIGHTS,
    CheckpointError,
    CheckpointFile,
    load_connector,
    write_checkpoint,
)
from vlm_composer.training.checkpoint_folder import CheckpointFolder, open_named

HOLD = {"save_folder": "{run_folder}/checkpoints", "save_interval": "2ba"}


def folder_of(config):
    return Path(config.folder("{run_folder}/checkpoints"))


def newest(config):
    checkpoint = CheckpointFolder(str(folder_of(config)), folder_of(config)).newest()
    assert checkpoint is not None
    return checkpoint


def check_contents(config, vlm):
    checkpoint = newest(config)
    weights = checkpoint.weights()
    assert weights.keys() == {f"connector.{n}" for n, _ in vlm.connector.named_parameters()}
    trained = sum(p.numel() for p in weights.values())
    size = checkpoint.path.stat().st_size
    assert 12 * trained < size < 12 * trained + 100_000, "weights and two moments, little else"


def test_a_checkpoint_holds_the_connector_and_its_optimizer_alone(tiny_config):
    config = tiny_config(**HOLD)
    _, vlm, _ = run(config)
    check_contents(config, vlm)
    names = sorted(path.name for path in folder_of(config).iterdir())
    assert names == ["ep0-ba2.safetensors", "ep0-ba4.safetensors", "latest"]
    assert (folder_of(config) / "latest").read_text() == "ep0-ba4.safetensors\n"


@pytest.mark.world_size(2)
@pytest.mark.parametrize("before", ["replicate", "shard"])
@pytest.mark.parametrize("after", ["replicate", "shard"])
def test_it_loads_under_another_parallelism(tiny_config, before, after):
    config = tiny_config(**HOLD, parallelism=before, device_train_microbatch_size=2)
    _, vlm, _ = run(config)
    dist.barrier()
    check_contents(config, vlm)
    weights = newest(config).weights()
    trainer, _, _ = start(
        tiny_config(
            run_folder=config.run_folder + "-2",
            load_path=config.folder("{run_folder}/checkpoints"),
            parallelism=after,
            device_train_microbatch_size=2,
        )
    )
    assert trainer.state.timestamp.batch == 4
    optimizer = trainer.state.optimizers[0]
    saved = newest(config)
    for name, parameter in trainer.state.model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("module.").removeprefix("model.")
        assert torch.equal(whole(parameter), weights[name]), name
        moment = whole(optimizer.state[parameter]["exp_avg_sq"])
        assert torch.equal(moment, saved.tensor(f"optimizer.exp_avg_sq.{name}")), name
    trainer.close()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_a_loaded_connector_is_the_trained_one(tiny_config):
    config = tiny_config(**HOLD)
    _, vlm, _ = run(config)
    template = assemble_template(config)
    fresh = assemble_model(config, "cpu", template.image_token_id)
    load_connector(fresh, newest(config))
    for name, parameter in vlm.named_parameters():
        assert torch.equal(parameter, dict(fresh.named_parameters())[name]), name


class Crash(Callback):
    """Ends a run one batch after its checkpoint."""

    class Now(Exception):
        pass

    def batch_end(self, state, logger):
        if state.timestamp.batch == 4:
            raise self.Now


def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_config, tmp_path):
    whole_run = tiny_config(
        max_duration="8ba", save_folder=str(tmp_path / "whole"), save_interval="8ba"
    )
    _, expected, watch = run(whole_run)
    changes = {
        "save_folder": str(tmp_path / "parts"),
        "save_interval": "3ba",
        "autoresume": True,
        "loggers": {"jsonl": {}},
    }
    trainer, _, first = start(tiny_config(max_duration="8ba", **changes))
    trainer.state.callbacks.append(Crash())
    with pytest.raises(Crash.Now):
        trainer.fit()
    trainer.close()
    trainer, resumed, second = start(tiny_config(max_duration="8ba", **changes))
    assert trainer.state.timestamp.batch == 3
    trainer.fit()
    trainer.close()
    assert first.ids[:3] + second.ids == watch.ids
    assert first.losses[:3] + second.losses == watch.losses
    assert all(map(torch.equal, resumed.connector.parameters(), expected.connector.parameters()))
    # The file of metrics tells of one run: what was trained twice stands there once.
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [r["loss/train/total"] for r in rows if "loss/train/total" in r] == watch.losses


def test_cut_answers_are_counted_over_a_resumption(tiny_config, tmp_path):
    from runs import last

    settings = {"max_duration": "1ep", "max_seq_len": 30}
    trainer, _, _ = run(tiny_config(**settings))
    changes = {"save_folder": str(tmp_path / "s"), "save_interval": "3ba", "autoresume": True}
    first, _, _ = start(tiny_config(**settings, **changes))
    first.state.callbacks.append(Crash())
    with pytest.raises(Crash.Now):
        first.fit()
    first.close()
    second, _, _ = run(tiny_config(**settings, **changes))
    assert last(second, "data/cut_answers") == last(trainer, "data/cut_answers") > 0


def test_only_the_newest_are_kept(tiny_config):
    config = tiny_config(**HOLD | {"save_interval": "1ba"}, save_num_checkpoints_to_keep=2)
    run(config)
    assert sorted(path.name for path in folder_of(config).glob("ep*")) == [
        "ep0-ba3.safetensors",
        "ep0-ba4.safetensors",
    ]


def test_the_newest_whole_one_is_found_by_looking(tiny_config):
    config = tiny_config(**HOLD | {"save_interval": "1ba"})
    run(config)
    (folder_of(config) / "latest").write_text("ep0-ba1.safetensors\n")  # stale
    assert newest(config).path.name == "ep0-ba4.safetensors"
    (folder_of(config) / "latest").unlink()
    truncate(folder_of(config) / "ep0-ba4.safetensors")
    assert newest(config).path.name == "ep0-ba3.safetensors"
    flip_a_bit(folder_of(config) / "ep0-ba3.safetensors")
    assert newest(config).path.name == "ep0-ba2.safetensors"


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)


def test_a_folder_with_checkpoints_is_not_written_into_by_mistake(tiny_config):
    run(tiny_config(**HOLD))
    with pytest.raises(CheckpointError, match=r"already holds 2 checkpoints.*autoresume"):
        start(tiny_config(**HOLD))
    config = tiny_config(**HOLD, save_overwrite=True, max_duration="1ba")
    run(config)
    assert [path.name for path in folder_of(config).glob("ep*")] == ["ep0-ba1.safetensors"]


def test_a_disk_that_fills_up_ends_the_run_and_says_so(tiny_config, tiny_disk):
    config = tiny_config(save_folder=str(tiny_disk / "checkpoints"), save_interval="1ba")
    with pytest.raises(OSError, match=r"could not write .*ep0-ba1.*; free some space"):
        run(config)
    left = sorted(path.name for path in (tiny_disk / "checkpoints").iterdir())
    assert left == []


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(WEIGHTS + "connector.resampler.latents"),
            r"lacks 1 of \d+ .*latents.* holds 0",
        ),
        (
            lambda t: t.update({WEIGHTS + "connector.extra": torch.ones(1)}),
            r"lacks 0 .* holds 1 others .*connector\.extra",
        ),
        (
            lambda t: t.update({WEIGHTS + "connector.resampler.latents": torch.ones(3, 2)}),
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
    other = {"dataset": {"local": str(shards / "eval")}, "num_workers": 0}
    changes = {"train_loader": other, "global_train_batch_size": 4, "load_path": newest(trained)}
    changes["load_path"] = str(changes["load_path"].path)
    with pytest.raises(CheckpointError, match=r"other data: .*'samples': 40.*'samples': 7"):
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
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
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
