"""A process that has transformers and not this project loads an export and computes the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exports import ANSWERS, PROMPTS
from vlm_composer.evaluation.captioning import caption_images

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("fresh_process.py")


@pytest.fixture(scope="module", params=["qwen_export", "llama_export"])
def fresh(request, tmp_path_factory):
    """The export, and what the process found."""
    exported = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("fresh")
    inputs, out = folder / "inputs.json", folder / "found"
    asked = {
        "pictures": [str(path) for path in exported.pictures],
        "prompts": PROMPTS,
        "answers": ANSWERS,
    }
    inputs.write_text(json.dumps(asked))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", SCRIPT, exported.folder, inputs, out],
        cwd=folder,
        env=env | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return exported, torch.load(out), done.stderr


def test_nothing_is_drawn_or_left_over(fresh):
    _, found, stderr = fresh
    assert not any(found["report"].values())
    assert "newly initialized" not in stderr
    assert "not used" not in stderr


def test_it_runs_the_copied_code(fresh):
    exported, found, _ = fresh
    assert "transformers_modules.export.modeling_vlm_composer" in found["modules"]
    assert not any(name.partition(".")[0] == "vlm_composer" for name in found["modules"])
    assert (exported.folder / "resampler.py").is_file()


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_loss_are_the_trainers(fresh, side):
    exported, found, _ = fresh
    logits, targets = exported.answer_logits()
    assert found[side]["targets"].tolist() == targets.tolist()
    error = (found[side]["logits"] - logits).abs().max() / logits.abs().max()
    assert error < 1e-5
    loss = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(found[side]["loss"], loss, rtol=1e-5, atol=0)


def test_inputs_are_those_of_the_training(fresh):
    exported, found, _ = fresh
    batch, tower = found["batch"], exported.vlm.vision_tower
    for row, mask, prompt in zip(batch["input_ids"], batch["attention_mask"], PROMPTS, strict=True):
        assert row[mask.bool()].tolist() == list(exported.template.encode_prompt(prompt))
    normalised = (exported.pixels().float() / 255 - tower.image_mean) / tower.image_std
    assert torch.equal(batch["pixel_values"], normalised)


def test_generate_gives_the_captions_of_the_evaluation(fresh):
    exported, found, _ = fresh
    expected = [
        caption_images(exported.vlm, exported.template, pixels[None], prompt, max_new_tokens=9)[0]
        for pixels, prompt in zip(exported.pixels(), PROMPTS, strict=True)
    ]
    assert found["captions"] == expected
    assert found["alone"] == expected
    assert found["without_cache"] == expected
    assert len(set(expected)) > 1


def test_saved_again_it_is_the_same(fresh):
    _, found, _ = fresh
    assert torch.equal(found["saved_logits"], found["left"]["logits"])


def test_it_loads_in_bf16(fresh):
    _, found, _ = fresh
    assert found["bf16_dtypes"] == ["torch.bfloat16"]
    torch.testing.assert_close(found["bf16_loss"].float(), found["left"]["loss"], rtol=0.1, atol=0)
