"""Checkpoints that are whole by their hashes and still malformed: refused with field and value."""

import json
import re
from copy import deepcopy

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from checkpoints import HOLD, folder_of, newest
from runs import run, start
from vlm_composer.training.checkpoint_file import CheckpointError, CheckpointFile, hash_tensor
from vlm_composer.training.checkpoint_schema import CALLBACKS

LATENTS = "connector.resampler.latents"


def forge(path, tensors, document):
    """Write a file as a stranger could: every hash is right."""
    text = document if isinstance(document, str) else json.dumps(document)
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    save_file(tensors, path, {"vlm_composer": text, "vlm_composer_digest": digest})
    return path


def contents(checkpoint):
    return {n: checkpoint.tensor(n) for n in checkpoint.names}, deepcopy(checkpoint.document)


@pytest.fixture(scope="module")
def saved():
    """What `whole` has read; empty before its first test."""
    return {}


@pytest.fixture
def whole(saved, tiny_config):
    """Tensors and document of a real checkpoint, of a run with every callback that has a state."""
    if not saved:
        callbacks = {"speed_monitor": {"gpu_flops_available": 1e12}, "warnings": {}}
        config = tiny_config(**HOLD, callbacks=callbacks, loggers={"jsonl": {}}, progress_bar=True)
        run(config)
        saved["tensors"], saved["document"] = contents(newest(config))
    return dict(saved["tensors"]), deepcopy(saved["document"])


def put(field, value):
    """A change of a document's field, such as `timestamp.batch` or `rng.0.numpy`."""

    def change(tensors, document):
        *path, last = [int(key) if key.isdecimal() else key for key in field.split(".")]
        for key in path:
            document = document[key]
        document[last] = value

    return change


def drop(field):
    def change(tensors, document):
        *path, last = field.split(".")
        for key in path:
            document = document[key]
        del document[last]

    return change


def tensor(name, value):
    """A change of a tensor, which has its right hash again; None leaves it out."""

    def change(tensors, document):
        tensors.pop(name, None)
        document["hashes"].pop(name, None)
        if value is not None:
            tensors[name] = value
            document["hashes"][name] = hash_tensor(value)

    return change


def nested(levels):
    return json.loads('{"a":' * levels + "0" + "}" * levels)


MALFORMED = [
    (drop("timestamp"), "timestamp is missing"),
    (put("timestamp", [1]), "timestamp is [1], expected an object"),
    (drop("timestamp.token"), "timestamp.token is missing"),
    (put("timestamp.batch", -3), "timestamp.batch is -3, expected a whole number of 0 or more"),
    (put("timestamp.batch", True), "timestamp.batch is True, expected a whole number"),
    (put("timestamp.batch", 2.5), "timestamp.batch is 2.5, expected a whole number"),
    (put("timestamp.epoch", "0"), "timestamp.epoch is '0', expected a whole number"),
    (put("timestamp.sample", 10**400), "timestamp.sample is 1000"),
    (put("timestamp.sample", 10**5000), "its document is not JSON (Exceeds the limit"),
    (put("timestamp.total_wct", float("nan")), "timestamp.total_wct is nan, expected seconds"),
    (put("timestamp.batch_wct", 1e300), "timestamp.batch_wct is 1e+300, expected seconds"),
    (put("timestamp.sample_in_epoch", 8), "sample_in_epoch is 32, timestamp.sample_in_epoch 8"),
    (put("lr", []), "lr is [], expected a list of one learning rate"),
    (put("lr", [float("inf")]), "lr is [inf], expected"),
    (put("lr", [-1e-3]), "lr is [-0.001], expected"),
    (put("lr", ["1e-3"]), "lr is ['1e-3'], expected"),
    (put("dataset.epoch", -1), "dataset.epoch is -1, expected"),
    (put("dataset.num_canonical_nodes", 0), "dataset.num_canonical_nodes is 0, expected"),
    (put("dataset.num_canonical_nodes", 2**40), "dataset.num_canonical_nodes is 1099511627776"),
    (put("dataset.shuffle_seed", None), "dataset.shuffle_seed is None, expected"),
    (drop("dataset.initial_physical_nodes"), "dataset.initial_physical_nodes is missing"),
    (put("data", None), "data is None, expected an object"),
    (put("data", nested(50)), "its document is nested deeper than 16 levels"),
    (put("callbacks", []), "callbacks is [], expected an object"),
    (put("callbacks.MetricsFile", {}), "callbacks.MetricsFile.bytes is missing"),
    (put("callbacks.MetricsFile.bytes", -1), "callbacks.MetricsFile.bytes is -1, expected"),
    (put("callbacks.LiveWarnings.losses", "12"), "callbacks.LiveWarnings.losses is '12', expected"),
    (put("callbacks.LiveWarnings.warned_at", {"a": "b"}), "LiveWarnings.warned_at is {'a': 'b'}"),
    (put("callbacks.LiveWarnings.exploded", [0]), "callbacks.LiveWarnings.exploded is [0]"),
    (put("callbacks.CutAnswers.tokens", 0.5), "callbacks.CutAnswers.tokens is 0.5, expected"),
    (put("callbacks.SpeedMonitor", 3), "callbacks.SpeedMonitor is 3, expected an object"),
    (put("rng", {}), "rng is {}, expected a list of objects"),
    (put("rng", []), "rng has 0 entries, world_size is 1"),
    (put("rng.0.numpy", ["MT19937", [1] * 624, 10**6, 0, 0.0]), "rng.0.numpy is ['MT19937', [1, "),
    (put("rng.0.numpy", ["MT19937", [1] * 623, 0, 0, 0.0]), "expected the state of numpy's"),
    (put("rng.0.numpy", ["MT19937", [-1] * 624, 0, 0, 0.0]), "rng.0.numpy is ['MT19937', [-1"),
    (put("rng.0.numpy.0", "PCG64"), "rng.0.numpy is ['PCG64'"),
    (put("rng.0.python", [3, [2**32] * 625, None]), "rng.0.python is [3, [4294967296"),
    (put("rng.0.python", [3, [], None]), "rng.0.python is [3, [], None], expected"),
    (put("rng.0.python.0", 4), "rng.0.python is [4, ["),
    (put("world_size", 0), "world_size is 0, expected a whole number of 1 or more"),
    (put("world_size", 2), "rng has 1 entries, world_size is 2"),
    (put("versions", {"torch": 2}), "versions is {'torch': 2}, expected an object of texts"),
    (drop("towers.language_model"), "towers.language_model is missing"),
    (put("towers.vision_tower.dtype", "complex64"), "towers.vision_tower.dtype is 'complex64'"),
    (put("towers.vision_tower.weights_hash", 5), "towers.vision_tower.weights_hash is 5, expected"),
    (put("settings", []), "settings is [], expected an object"),
    (put("settings.train_loader", None), "settings.train_loader is None, expected an object"),
    (put("hashes", None), "hashes is None, expected an object of texts"),
    (drop("format"), "has format None; this version reads 1"),
    (put("format", True), "has format True; this version reads 1"),
    (put("format", 2), "has format 2; this version reads 1"),
    (
        tensor(f"weights.{LATENTS}", torch.ones(4, 32, dtype=torch.complex64)),
        f"weights.{LATENTS} has dtype C64, expected real numbers",
    ),
    (
        tensor(f"weights.{LATENTS}", torch.ones(4, 32, dtype=torch.int32)),
        f"weights.{LATENTS} has dtype I32, expected real numbers",
    ),
    (tensor(f"weights.{LATENTS}", None), "holds optimizer.exp_avg.connector.resampler.latents, wh"),
    (
        tensor(f"optimizer.exp_avg.{LATENTS}", torch.zeros(())),
        f"optimizer.exp_avg.{LATENTS} has shape (), its weight has (4, 32)",
    ),
    (
        tensor(f"optimizer.exp_avg_sq.{LATENTS}", torch.zeros(1, 32)),
        f"optimizer.exp_avg_sq.{LATENTS} has shape (1, 32), its weight has (4, 32)",
    ),
    (
        tensor(f"optimizer.exp_avg.{LATENTS}", torch.zeros(4, 32, dtype=torch.complex64)),
        f"optimizer.exp_avg.{LATENTS} has dtype C64, expected real numbers",
    ),
    (tensor(f"optimizer.exp_avg.{LATENTS}", None), f"it lacks optimizer.exp_avg.{LATENTS}"),
    (
        tensor(f"optimizer.step.{LATENTS}", torch.tensor(float("nan"))),
        f"optimizer.step.{LATENTS} is nan, expected one finite number of 0 or more",
    ),
    (
        tensor(f"optimizer.step.{LATENTS}", torch.tensor(-4.0)),
        f"optimizer.step.{LATENTS} is -4.0, expected one finite number of 0 or more",
    ),
    (
        tensor(f"optimizer.step.{LATENTS}", torch.ones(2)),
        f"optimizer.step.{LATENTS} is of shape (2,), expected one finite number",
    ),
    (tensor("rng.0.torch", None), "it lacks rng.0.torch"),
    (tensor("rng.0.torch", torch.zeros(16)), "rng.0.torch has dtype F32 and shape (16,), expected"),
    (
        tensor("rng.0.torch", torch.zeros(5056, dtype=torch.uint8)),
        "rng.0.torch is not the state of a generator: Invalid mt19937 state",
    ),
    (tensor("rng.7.torch", torch.zeros(1)), "it holds rng.7.torch, which belongs to no"),
    (tensor("surprise", torch.zeros(1)), "it holds surprise, which belongs to no weight"),
    (drop(f"hashes.weights.{LATENTS}"), f"is damaged: weights.{LATENTS} is not what was saved"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED, ids=[m for _, m in MALFORMED])
def test_a_malformed_checkpoint_is_refused(whole, tmp_path, change, message):
    tensors, document = whole
    assert CheckpointFile(forge(tmp_path / "whole", tensors, document)).document == document
    if message.startswith("is damaged"):
        del document["hashes"][f"weights.{LATENTS}"]
    elif "not JSON" in message:
        document = json.dumps(document).replace('"sample": 32', f'"sample": 1{"0" * 5000}')
    else:
        change(tensors, document)
    path = forge(tmp_path / "malformed", tensors, document)
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        CheckpointFile(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "its document is [], expected an object"),
        ("{", "its document is not JSON"),
        ("[" * 100_000, "its document is not JSON"),
    ],
    ids=["list", "cut", "deep"],
)
def test_a_document_that_is_none_is_refused(whole, tmp_path, text, message):
    path = forge(tmp_path / "malformed", whole[0], text)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        CheckpointFile(path)


def test_a_checkpoint_without_weights_is_refused(whole, tmp_path):
    document = whole[1]
    document["hashes"] = {}
    with pytest.raises(CheckpointError, match="it has no trained weights"):
        CheckpointFile(forge(tmp_path / "malformed", {}, document))


def test_every_state_of_a_callback_has_a_schema(whole):
    assert whole[1]["callbacks"].keys() == CALLBACKS.keys()


def test_a_malformed_newest_is_passed_over(tiny_config, capsys):
    config = tiny_config(**HOLD, autoresume=True)
    run(config)
    tensors, document = contents(newest(config))
    document["timestamp"]["batch"] = -3
    forge(folder_of(config) / "ep0-ba9.safetensors", tensors, document)
    trainer, _, _ = start(config)
    assert trainer.state.timestamp.batch == 4
    trainer.close()
    said = [line for line in capsys.readouterr().err.splitlines() if "Passing over" in line]
    assert len(said) == 1
    assert "ep0-ba9.safetensors: " in said[0]
    assert "timestamp.batch is -3, expected a whole number of 0 or more" in said[0]


def test_a_callback_that_saves_nothing_is_given_nothing(tiny_config):
    """A progress bar's state would be arguments of a function."""
    config = tiny_config(**HOLD)
    run(config)
    tensors, document = contents(newest(config))
    document["callbacks"]["ProgressBarLogger"] = {"train_pbar": {"n": 0, "hostile": 1}}
    path = forge(folder_of(config) / "ep0-ba9.safetensors", tensors, document)
    trainer, _, _ = start(tiny_config(load_path=str(path), progress_bar=True))
    assert trainer.state.timestamp.batch == 4
    trainer.close()
