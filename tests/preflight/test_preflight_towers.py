"""Towers and tokenizer are judged by their configurations, with no weight read."""

import json

import pytest
from huggingface_hub import constants

from tiny import tiny_qwen3, tiny_siglip
from vlm_composer.preflight.towers import (
    check_language_model,
    check_tokenizer,
    check_vision_tower,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def texts(found, level):
    return [str(finding) for finding in found if finding.level == level]


def test_towers_that_can_be_had(tiny_config, towers):
    config = tiny_config(vision_tower={"name": str(towers / "siglip"), "layer": -2})
    (vision,) = texts(check_vision_tower(config), "ok")
    assert vision == f"{towers}/siglip: 2 layers, 16 patches of 32 × 32 pixels"
    (language,) = texts(check_language_model(config), "ok")
    assert language == f"{towers}/qwen3: 3 layers, width 64"
    (tokenizer,) = texts(check_tokenizer(config), "ok")
    assert tokenizer == f"{towers}/qwen3: <image_patch> is 258, in a table of 300 rows"


def test_a_table_without_a_spare_row(tiny_config, tmp_path, towers):
    tiny_qwen3(vocab_size=258).save_pretrained(tmp_path / "small")
    changes = {"name": str(tmp_path / "small"), "tokenizer": str(towers / "qwen3")}
    (text,) = texts(check_tokenizer(tiny_config(language_model=changes)), "ok")
    assert "the table of 258 rows has none to spare and will be resized to 259, frozen" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "{towers}/siglip", "layer": 4}, "hidden states -4 to 3"),
        ({"name": "{towers}/siglip", "image_size": 7}, "7 is less than one patch of 8 pixels"),
        ({"name": "{towers}/nothing"}, "there is no folder"),
        ({"name": "google/vit-base"}, "HF_HUB_OFFLINE is set; check the name, download it first"),
    ],
)
def test_a_vision_tower_that_cannot_be_used(tiny_config, towers, changes, message):
    changes |= {"name": changes["name"].format(towers=towers)}
    (text,) = texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")
    assert message in text


def test_a_vision_tower_for_a_language_model(tiny_config, towers):
    changes = {"name": str(towers / "siglip"), "tokenizer": str(towers / "nothing")}
    config = tiny_config(language_model=changes)
    (text,) = texts(check_language_model(config), "failure")
    assert "which transformers has no causal language model for" in text
    (text,) = texts(check_tokenizer(config), "failure")
    assert f"there is no folder {towers}/nothing" in text


def test_what_sharding_and_positions_allow(tiny_config, towers):
    config = tiny_config(
        language_model={"name": str(towers / "llama")}, parallelism="shard", max_seq_len=513
    )
    found = check_language_model(config)
    assert "tie_word_embeddings" in texts(found, "failure")[0]
    config.parallelism = "replicate"
    (found,) = [f for f in check_language_model(config) if f.level != "ok"]
    assert found.level == "failure"
    assert str(found) == (
        f"max_seq_len: 513 is more than the 512 positions of {towers / 'llama'} "
        "(max_position_embeddings); set 512 or less"
    )
    config.max_seq_len = 512
    assert not [f for f in check_language_model(config) if f.level != "ok"]


def test_weights_that_are_not_all_there(tiny_config, tmp_path):
    folder = tmp_path / "siglip"
    tiny_siglip().save_pretrained(folder, max_shard_size="50kB")
    names = set(
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    changes = {"name": str(folder)}
    assert not texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")
    lost = folder / max(names)
    lost.unlink()
    (text,) = texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")
    assert f"lacks 1 of its {len(names)} files of weights, the first is {lost.name}" in text
    for path in folder.glob("model*"):
        path.unlink()
    (text,) = texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")
    assert f"{folder} has no model.safetensors" in text
    changes["pretrained"] = False
    assert not texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")


def test_a_hub_that_cannot_be_reached_is_told_at_once(tiny_config, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (text,) = texts(check_vision_tower(tiny_config(vision_tower={"name": "no/one"})), "failure")
    assert "the hub (http://127.0.0.1:9) cannot be reached; check the name and the network" in text
