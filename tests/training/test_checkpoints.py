"""Checkpoints hold what is trained, load anywhere and are kept in order."""

import json
import os
import subprocess

import pytest
import torch
from composer.core import Callback
from composer.utils import dist

from checkpoints import HOLD, folder_of, newest
from runs import run, start
from vlm_composer.assembly import assemble_model, assemble_template
from vlm_composer.preflight.report import PreflightError
from vlm_composer.training.checkpoint_file import load_connector
from vlm_composer.training.checkpoint_folder import CheckpointFolder
from vlm_composer.training.checkpointing import Checkpointer


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
    """Ends a run after a batch, one after its checkpoint."""

    class Now(Exception):
        pass

    def __init__(self, batch=4):
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch == self.batch:
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


def test_a_checkpoint_is_saved_whoever_closes_its_thread(tiny_config, tmp_path):
    """Python's garbage collector may be the thread itself, where a run has failed."""
    trainer, _, _ = start(tiny_config(save_folder=str(tmp_path / "first")))
    trainer.fit()
    checkpointer = next(c for c in trainer.state.callbacks if isinstance(c, Checkpointer))

    class ClosingFolder(CheckpointFolder):
        def add(self, path, name):
            checkpointer.close(trainer.state, trainer.logger)
            super().add(path, name)

    checkpointer.folder = ClosingFolder(str(tmp_path / "second"), tmp_path)
    checkpointer.save(trainer.state)
    checkpointer.wait()
    assert [path.name for path in (tmp_path / "second").glob("ep*")] == ["ep0-ba4.safetensors"]


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
    with pytest.raises(PreflightError, match=r"already holds 2 checkpoints.*autoresume"):
        start(tiny_config(**HOLD))
    config = tiny_config(**HOLD, save_overwrite=True, max_duration="1ba")
    run(config)
    assert [path.name for path in folder_of(config).glob("ep*")] == ["ep0-ba1.safetensors"]


def test_a_disk_that_fills_up_ends_the_run_and_says_so(tiny_config, tiny_disk):
    subprocess.run(["mount", "-o", "remount,size=4m", tiny_disk], check=True)
    config = tiny_config(save_folder=str(tiny_disk / "checkpoints"), save_interval="1ba")
    trainer, _, _ = start(config)
    (tiny_disk / "of another").write_bytes(bytes(4_000_000))
    with pytest.raises(OSError, match=r"could not write .*ep0-ba1.*; free some space"):
        trainer.fit()
    trainer.close()
    left = sorted(path.name for path in (tiny_disk / "checkpoints").iterdir())
    assert left == []
