"""Checkpoints hold what is trained, load strictly, and run nothing."""

import os

import pytest
import torch
from composer.core import Callback
from composer.utils import dist
from runs import run, start

from vlm_composer.assembly import assemble_model, assemble_template
from vlm_composer.training.checkpoints import load_connector, read_connector


def saving(tiny_config, **changes):
    return tiny_config(save_folder="{run_folder}/checkpoints", save_interval="2ba", **changes)


def newest(config):
    return config.folder("{run_folder}/checkpoints/latest-rank0.pt")


def check_contents(config, vlm):
    connector = read_connector(newest(config))
    assert connector.keys() == dict(vlm.connector.named_parameters()).keys()
    trained = sum(p.numel() for p in connector.values())
    size = os.path.getsize(newest(config))
    assert 12 * trained < size < 12 * trained + 100_000, "weights and two moments, little else"


def test_a_checkpoint_holds_the_connector_and_its_optimizer_alone(tiny_config):
    config = saving(tiny_config)
    _, vlm, _ = run(config)
    check_contents(config, vlm)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("parallelism", ["replicate", "shard"])
def test_it_does_under_parallelism_too(tiny_config, parallelism):
    config = saving(tiny_config, parallelism=parallelism, device_train_microbatch_size=2)
    trainer, vlm, _ = run(config)
    dist.barrier()
    assert trainer.state.timestamp.batch == 4
    check_contents(config, vlm)


def test_a_loaded_connector_is_the_trained_one(tiny_config):
    config = saving(tiny_config)
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
    whole = tiny_config(
        max_duration="8ba", save_folder=str(tmp_path / "whole"), save_interval="8ba"
    )
    _, expected, watch = run(whole)
    folder = str(tmp_path / "parts")
    changes = {"save_folder": folder, "save_interval": "3ba", "autoresume": True}
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


def altered(config, change):
    checkpoint = torch.load(newest(config), weights_only=False)
    change(checkpoint["state"]["model"])
    path = newest(config).replace("latest-rank0", "altered")
    torch.save(checkpoint, path)
    return path


def test_a_checkpoint_without_a_trained_weight_is_refused(tiny_config):
    config = saving(tiny_config)
    run(config)
    path = altered(config, lambda model: model.pop("model.connector.resampler.latents"))
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ .*latents.* holds 0"):
        start(tiny_config(load_path=path))


def test_a_checkpoint_with_another_weight_is_refused(tiny_config):
    config = saving(tiny_config)
    run(config)
    path = altered(config, lambda model: model.update({"model.connector.extra": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"lacks 0 .* holds 1 others .*connector\.extra"):
        start(tiny_config(load_path=path))


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_reading_a_connector_runs_nothing(tiny_config, tmp_path):
    config = saving(tiny_config)
    run(config)
    marker = str(tmp_path / "ran")
    path = altered(config, lambda model: model.update({"model.connector.x": Payload(marker)}))
    with pytest.raises(ValueError, match="is not a checkpoint of a connector"):
        read_connector(path)
    assert not os.path.exists(marker)
    torch.load(path, weights_only=False)  # the payload is a real one
    assert os.path.exists(marker)


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint of a connector"):
        read_connector(tmp_path / "x.pt")
