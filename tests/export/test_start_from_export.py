"""An export starts a run: its connector, between the same towers and no others."""

import dataclasses
import json
import shutil
import uuid

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs import start
from shared_memory import released_shared_memory
from vlm_composer.config import TrainConfig
from vlm_composer.export.exporting import export_checkpoint
from vlm_composer.preflight.stores import check_load_path
from vlm_composer.storage import open_store
from vlm_composer.training.checkpoint_file import CheckpointError, hash_tensor
from vlm_composer.training.checkpoint_folder import open_named


@pytest.fixture
def config_from(qwen_export, tmp_path):
    """The run's configuration, started from an export."""

    def make(folder, **changes) -> TrainConfig:
        settings = {
            "run_folder": str(tmp_path / "run"),
            "save_folder": None,
            "load_path": str(folder),
            "load_weights_only": True,
        }
        return dataclasses.replace(qwen_export.config, **settings | changes)

    return make


@pytest.mark.parametrize("with_towers", [False, True])
def test_a_run_starts_from_an_export(qwen_export, config_from, tmp_path, with_towers):
    folder = qwen_export.folder
    if with_towers:
        folder = export_checkpoint(qwen_export.checkpoints, tmp_path / "whole", with_towers=True)
    trainer, vlm, watch = start(config_from(folder))
    expected = dict(qwen_export.vlm.named_parameters())
    for name, parameter in vlm.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert trainer.state.timestamp.batch == 0
    trainer.fit()
    trainer.close()
    assert len(watch.losses) == 4


def upload(folder, bucket):
    store = open_store(f"{bucket}/exported")
    for path in folder.iterdir():
        store.put(path, path.name)
    return f"{bucket}/exported"


@pytest.mark.s3
def test_one_in_a_bucket_starts_a_run(qwen_export, config_from, tmp_path, s3_server, monkeypatch):
    """Of towers that lie beside the connector, in files of their own, nothing is downloaded."""
    whole = export_checkpoint(qwen_export.checkpoints, tmp_path / "whole", with_towers=True)
    tensors = load_file(whole / "model.safetensors")
    files = {
        name: f"model-{1 + name.startswith('connector.'):05}-of-00002.safetensors"
        for name in tensors
    }
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, whole / file)
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (whole / "model.safetensors").unlink()
    url = upload(whole, s3_server.make_bucket("start-from-export"))

    config = config_from(url)
    (found,) = check_load_path(config, 0)
    assert found.text == f"starts from the connector of {url}"
    downloaded = []
    store_class = type(open_store(url))
    get = store_class.get

    def watched_get(self, name, path):
        downloaded.append(name)
        get(self, name, path)

    monkeypatch.setattr(store_class, "get", watched_get)
    trainer, vlm, _ = start(config)
    trainer.close()
    expected = dict(qwen_export.vlm.named_parameters())
    for name, parameter in vlm.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert sorted(downloaded) == [
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "vlm_composer.json",
    ]
    assert [path for path in (tmp_path / "run").rglob("*") if "export" in path.name] == []


@pytest.mark.s3
def test_what_is_wrong_with_one_in_a_bucket_names_the_bucket(
    qwen_export, config_from, tmp_path, s3_server
):
    moved = shutil.copytree(qwen_export.folder, tmp_path / "moved")
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    url = upload(moved, s3_server.make_bucket("damaged-export"))
    said = refusal(config_from(url))
    assert url in said
    assert "is not what was exported" in said
    empty = f"{s3_server.make_bucket('no-export')}/nothing"
    with pytest.raises(CheckpointError, match=f"{empty} holds no checkpoint .* and no export"):
        open_named(empty, tmp_path / "scratch")


def refusal(config):
    with released_shared_memory(), pytest.raises(CheckpointError) as caught:
        start(config)
    return str(caught.value)


def test_it_has_no_position_to_go_on_from(qwen_export, config_from):
    said = refusal(config_from(qwen_export.folder, load_weights_only=False))
    assert "is an export, which has no optimizer and no position" in said
    assert "set load_weights_only: true" in said


def test_other_towers_are_refused_with_both_values(qwen_export, llama_export, config_from):
    tower = dataclasses.replace(
        qwen_export.config.vision_tower, name=llama_export.config.vision_tower.name
    )
    said = refusal(config_from(qwen_export.folder, vision_tower=tower))
    assert "was trained with another vision_tower: config_hash" in said
    assert qwen_export.config.vision_tower.name in said
    assert llama_export.config.vision_tower.name in said


def test_another_connector_is_refused(qwen_export, config_from):
    connector = dataclasses.replace(qwen_export.config.connector, vision_ln=False)
    said = refusal(config_from(qwen_export.folder, connector=connector))
    assert "is of another connector" in said


def test_a_connector_that_was_changed_is_refused(qwen_export, config_from, tmp_path):
    moved = shutil.copytree(qwen_export.folder, tmp_path / "moved")
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    assert "is not what was exported" in refusal(config_from(moved))
    (moved / "vlm_composer.json").write_text("{}")
    assert f"{moved} has format None; this version reads 1" in refusal(config_from(moved))


def moved_export(qwen_export, tmp_path):
    return shutil.copytree(qwen_export.folder, tmp_path / "moved")


def change(path, field, value):
    document = json.loads(path.read_text())
    *keys, last = field.split(".")
    inner = document
    for key in keys:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 9, "has format 9; this version reads 1"),
        ("connector", None, "connector is None, expected an object"),
        ("connector.hashes", [], "connector.hashes is [], expected an object of texts"),
        ("towers", {}, "towers.vision_tower is missing"),
        ("towers.language_model.config_hash", 1, "language_model.config_hash is 1, expected text"),
    ],
)
def test_a_malformed_one_is_refused(qwen_export, config_from, tmp_path, field, value, message):
    moved = moved_export(qwen_export, tmp_path)
    change(moved / "vlm_composer.json", field, value)
    said = refusal(config_from(moved))
    assert str(moved) in said
    assert message in said


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000], ids=["list", "cut", "deep"])
@pytest.mark.parametrize("name", ["vlm_composer.json", "model.safetensors.index.json"])
def test_one_without_its_documents_is_refused(qwen_export, config_from, tmp_path, name, text):
    moved = moved_export(qwen_export, tmp_path)
    (moved / name).write_text(text)
    assert f"{moved}: {name} is damaged" in refusal(config_from(moved))


def test_one_of_no_real_numbers_is_refused(qwen_export, config_from, tmp_path):
    moved = moved_export(qwen_export, tmp_path)
    tensors = load_file(moved / "model.safetensors")
    tensors = {name: tensor.to(torch.complex64) for name, tensor in tensors.items()}
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    hashes = {name: hash_tensor(tensor) for name, tensor in tensors.items()}
    change(moved / "vlm_composer.json", "connector.hashes", hashes)
    assert "holds torch.complex64, expected real numbers" in refusal(config_from(moved))
    (moved / "model.safetensors").write_bytes(b"nothing")
    assert f"{moved}: model.safetensors is damaged" in refusal(config_from(moved))


@pytest.mark.s3
@pytest.mark.parametrize("name", ["../../outside.safetensors", "{absolute}", "..", "a/b", ""])
def test_an_index_that_leads_elsewhere_is_refused(
    qwen_export, config_from, tmp_path, s3_server, name
):
    outside = tmp_path / "outside.safetensors"
    name = name.format(absolute=outside)
    moved = moved_export(qwen_export, tmp_path)
    index = json.dumps({"weight_map": {"connector.x": name}})
    (moved / "model.safetensors.index.json").write_text(index)
    expected = f"model.safetensors.index.json names {name[:80]!r}, which is not a safetensors file"
    assert expected in refusal(config_from(moved))
    url = upload(moved, s3_server.make_bucket(f"hostile-export-{uuid.uuid4().hex}"))
    assert expected in refusal(config_from(url))
    assert not outside.exists()
