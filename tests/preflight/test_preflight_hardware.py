"""What a rank takes is compared with what there is, a container's limit included."""

import re

import pytest
import torch

from vlm_composer.assembly import assemble_model
from vlm_composer.preflight.hardware import (
    _container_memory,
    check_device,
    check_memory,
    keys_of_bf16,
)


def test_a_model_that_fits(tiny_config):
    (found,) = check_memory(tiny_config(), "cpu")
    assert found.level == "ok"
    assert "adamw moments 316.7 kB" in found.text


def test_a_model_that_cannot_fit(tiny_config, towers):
    huge = {"hidden_size": 65_536, "intermediate_size": 1_000_000}
    language_model = {"name": str(towers / "qwen3"), "pretrained": False}
    config = tiny_config(language_model=language_model | {"config_overrides": huge})
    (found,) = check_memory(config, "cpu")
    assert found.level == "failure"
    assert "TB (towers " in found.text
    assert "parallelism: shard" in found.advice


def test_a_container_has_less_than_its_machine(tmp_path):
    assert _container_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 300\nfile 400\n")
    assert _container_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert _container_memory(tmp_path) == 700


def test_what_insists_on_bf16(tiny_config, towers):
    tower = {"name": str(towers / "siglip")}
    assert keys_of_bf16(tiny_config(vision_tower=tower)) == ["vision_tower.dtype"]
    tower["dtype"] = "auto"
    assert keys_of_bf16(tiny_config(vision_tower=tower, precision="auto")) == []
    assert keys_of_bf16(tiny_config(vision_tower=tower, precision="amp_bf16")) == ["precision"]


def test_this_cpu(tiny_config):
    (found,) = check_device(tiny_config(), "cpu")
    assert found.level == "ok"
    assert found.text.startswith("CPU, ")


def test_preflight_and_the_run_give_the_same_text_and_advice(tiny_config, towers, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/compiler"))
    insisting = tiny_config(compile_blocks=True)
    (found,) = [one for one in check_device(insisting, "cpu") if one.level == "failure"]
    assert str(found) == (
        "compile_blocks: true, but torch finds no C++ compiler; install it, or set "
        "compile_blocks: auto"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(str(found))}$"):
        assemble_model(insisting, "cpu")
