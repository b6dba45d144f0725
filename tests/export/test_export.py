"""What an export holds, and what is refused."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from checkpoints import newest
from exports import ANSWERS, PROMPTS, read_card, train_and_export
from tiny import make_likeliest, tiny_siglip
from vlm_composer.export import __main__ as command
from vlm_composer.export.exporting import export_checkpoint
from vlm_composer.export.loading import caption_images, load_export, load_processor
from vlm_composer.export.remote_code.configuration_vlm_composer import VLMComposerConfig
from vlm_composer.export.remote_code.modeling_vlm_composer import (
    VLMComposerForConditionalGeneration,
)
from vlm_composer.training.checkpoint_file import CheckpointError


def answer_logits(exported, model, processor=None):
    processor = processor or load_processor(exported.folder)
    batch = processor([str(p) for p in exported.pictures], PROMPTS, ANSWERS)
    with torch.no_grad():
        return model(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100]


def close(found, expected):
    return (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_the_file_holds_the_connector_alone(qwen_export):
    weights = load_file(qwen_export.folder / "model.safetensors")
    expected = newest(qwen_export.config).weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_the_newest_of_a_folder_or_one_by_name(qwen_export, tmp_path):
    facts = json.loads((qwen_export.folder / "vlm_composer.json").read_bytes())
    assert facts["checkpoint"] == "ep0-ba4.safetensors"
    assert facts["run"]["batches"] == 4
    export_checkpoint(f"{qwen_export.checkpoints}/ep0-ba2.safetensors", tmp_path / "two")
    facts = json.loads((tmp_path / "two" / "vlm_composer.json").read_bytes())
    assert facts["checkpoint"] == "ep0-ba2.safetensors"


def test_the_card_says_what_the_run_was(qwen_export):
    card = read_card(qwen_export.folder)
    facts = json.loads((qwen_export.folder / "vlm_composer.json").read_bytes())
    for words in (
        "tiny\n",
        "ep0-ba4.safetensors",
        facts["towers"]["vision_tower"]["weights_hash"],
        "4, of 8 samples each",
        "evaluation loss\n",
        "training loss of the last batch\n",
        "samples 40, index_xxh64",
        "No inference engine was tried",
        "Not stated: nobody has said yet under which licence",
    ):
        assert words in card
    head = yaml.safe_load((qwen_export.folder / "README.md").read_text().split("---\n")[1])
    assert "license" not in head
    assert "base_model" not in head, "a folder's name is no hub id"


def test_the_default_prompt_is_the_commonest_of_the_training_data(qwen_export):
    processor = load_processor(qwen_export.folder)
    assert processor.default_prompt in ("<image>\nColour?", "What colour is it?\n<image>")
    image = str(qwen_export.pictures[0])
    asked, silent = processor(image, processor.default_prompt), processor(image)
    assert torch.equal(asked["input_ids"], silent["input_ids"])


def test_generation_is_greedy_and_ends_as_trained(llama_export):
    config = json.loads((llama_export.folder / "generation_config.json").read_bytes())
    assert config["eos_token_id"] == llama_export.template.tokenizer.eos_token_id
    assert not config.get("do_sample")


@pytest.mark.parametrize("name", ["qwen_export", "llama_export"])
def test_the_image_token_is_never_said(name, request):
    exported = request.getfixturevalue(name)
    model, processor = load_export(exported.folder, device="cpu")
    batch = processor([str(path) for path in exported.pictures], PROMPTS)
    said = model.generate(**batch, max_new_tokens=9)
    make_likeliest(
        exported.vlm.image_token_id,
        model.get_output_embeddings(),
        lambda: model.generate(**batch, max_new_tokens=1),
    )
    assert torch.equal(model.generate(**batch, max_new_tokens=9), said)


@pytest.mark.parametrize("name", ["qwen_export", "llama_export"])
def test_with_towers_nothing_else_is_needed(name, request, tmp_path):
    exported = request.getfixturevalue(name)
    whole = export_checkpoint(exported.checkpoints, tmp_path / "whole", with_towers=True)
    assert VLMComposerConfig.from_pretrained(whole).towers is None
    assert str(exported.folder.parent) not in (whole / "config.json").read_text()
    model, processor = load_export(whole, device="cpu")
    assert close(answer_logits(exported, model, processor), exported.answer_logits().logits)


def test_a_large_model_is_written_in_shards(qwen_export, tmp_path):
    model, _ = load_export(qwen_export.folder, device="cpu")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = VLMComposerForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(answer_logits(qwen_export, again), answer_logits(qwen_export, model))


def test_dtypes_of_the_weights(qwen_export, tmp_path):
    half = export_checkpoint(qwen_export.checkpoints, tmp_path / "half", dtype="bf16")
    weights = load_file(half / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    auto = VLMComposerForConditionalGeneration.from_pretrained(half, torch_dtype="auto")
    assert {p.dtype for p in auto.parameters()} == {torch.bfloat16}
    plain = VLMComposerForConditionalGeneration.from_pretrained(half)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    whole = export_checkpoint(
        qwen_export.checkpoints, tmp_path / "whole", with_towers=True, dtype="bf16"
    )
    weights = load_file(whole / "model.safetensors")
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.bfloat16}


def test_weights_are_made_once(qwen_export, tmp_path, monkeypatch):
    """Before it is filled, a model that is loaded takes no memory."""
    made = []
    original = VLMComposerForConditionalGeneration.__init__

    def look(self, *args, **options):
        original(self, *args, **options)
        made.append({p.device.type for p in self.parameters()})

    monkeypatch.setattr(VLMComposerForConditionalGeneration, "__init__", look)
    model, _ = load_export(qwen_export.folder, device="cpu")
    model.save_pretrained(tmp_path)
    VLMComposerForConditionalGeneration.from_pretrained(tmp_path, low_cpu_mem_usage=True)
    assert made == [{"meta"}, {"meta"}]
    with torch.device("meta"):
        VLMComposerForConditionalGeneration(VLMComposerConfig.from_pretrained(tmp_path))


def test_a_random_model_of_a_configuration(qwen_export):
    config = VLMComposerConfig.from_pretrained(qwen_export.folder)
    logits = answer_logits(qwen_export, VLMComposerForConditionalGeneration(config).eval())
    assert logits.isfinite().all()


def test_towers_that_are_elsewhere(qwen_export, tmp_path):
    moved = shutil.copytree(qwen_export.folder, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_bytes())
    names = {part: tower["name"] for part, tower in config["towers"].items()}
    for tower in config["towers"].values():
        tower["name"] = str(tmp_path / "nowhere")
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="nowhere"):
        load_export(moved, device="cpu")
    model, _ = load_export(moved, device="cpu", **names)
    assert close(answer_logits(qwen_export, model), qwen_export.answer_logits().logits)


def test_several_devices_need_the_whole_model(qwen_export):
    with pytest.raises(ValueError, match="the towers are loaded one by one"):
        VLMComposerForConditionalGeneration.from_pretrained(qwen_export.folder, device_map="auto")


def test_a_connector_that_does_not_fit_is_not_drawn(qwen_export, tmp_path):
    moved = shutil.copytree(qwen_export.folder, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_bytes())
    config["connector"]["depth"] = 3
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the connector: \d+ weights do not fit the model"):
        load_export(moved, device="cpu")


def test_images_and_prompts_that_do_not_fit_each_other(qwen_export):
    model, processor = load_export(qwen_export.folder, device="cpu")
    picture = str(qwen_export.pictures[0])
    with pytest.raises(ValueError, match="2 images, 3 prompts"):
        processor([picture] * 2, PROMPTS)
    with pytest.raises(ValueError, match="a prompt has one <image>, this one has 2"):
        processor([picture], "<image><image>")
    batch = processor([picture] * 2, "What?")
    assert batch["input_ids"].shape[0] == 2
    with pytest.raises(ValueError, match=r"\[4, 4\] <image_patch> tokens for 1 image"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match=r"\[4, 4\] <image_patch> tokens for 0 image"):
        model(input_ids=batch["input_ids"])


def test_beams_and_gradients(qwen_export):
    model, processor = load_export(qwen_export.folder, device="cpu")
    pictures = [str(path) for path in qwen_export.pictures]
    batch = processor(pictures, PROMPTS)
    beams = model.generate(**batch, num_beams=2, max_new_tokens=4)
    assert len(processor.captions_of(beams, batch)) == 3
    model(**processor(pictures, PROMPTS, ANSWERS)).loss.backward()
    assert all(p.grad is not None for p in model.connector.parameters())


def test_a_folder_that_is_not_empty_is_left_alone(qwen_export, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert command.main([qwen_export.checkpoints, "--out", str(tmp_path)]) == 1
    assert "is not empty; choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_of_an_export_that_failed(qwen_export, tmp_path):
    damaged = tmp_path / "ep0-ba4.safetensors"
    data = bytearray(newest(qwen_export.config).path.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        export_checkpoint(str(damaged), tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a checkpoint of a training run"):
        export_checkpoint(str(qwen_export.folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [damaged.name]


def changed_yaml(exported, tmp_path, **tower):
    settings = yaml.safe_load((exported.folder.parent / "run.yaml").read_text())
    settings["vision_tower"] |= tower
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "changed.yaml"


def test_a_yaml_says_where_the_towers_are_now(qwen_export, tmp_path, capsys):
    moved = shutil.copytree(qwen_export.folder.parent / "vision", tmp_path / "vision")
    changed = changed_yaml(qwen_export, tmp_path, name=str(moved))
    out = tmp_path / "out"
    command.main([qwen_export.checkpoints, "--out", str(out), "--yaml", str(changed)])
    said = capsys.readouterr().err
    assert f"Settings: those of {changed}" in said
    assert f"vision_tower: {moved}" in said
    assert VLMComposerConfig.from_pretrained(out).towers["vision_tower"]["name"] == str(moved)


def test_another_tower_is_refused(qwen_export, llama_export, tmp_path):
    other = changed_yaml(qwen_export, tmp_path, name=str(llama_export.folder.parent / "vision"))
    with pytest.raises(CheckpointError, match="trained with another vision_tower: config_hash"):
        export_checkpoint(qwen_export.checkpoints, tmp_path / "out", yaml=other)


def test_a_tower_of_other_weights_is_refused(qwen_export, tmp_path):
    moved = shutil.copytree(qwen_export.folder.parent / "vision", tmp_path / "vision")
    weights = load_file(moved / "model.safetensors")
    weights["vision_model.encoder.layers.0.mlp.fc1.bias"][0] += 1
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    changed = changed_yaml(qwen_export, tmp_path, name=str(moved))
    with pytest.raises(CheckpointError, match="trained with another vision_tower: weights_hash"):
        export_checkpoint(qwen_export.checkpoints, tmp_path / "out", yaml=changed, with_towers=True)


def test_towers_of_random_weights_are_refused(qwen_export, tmp_path):
    changed = changed_yaml(qwen_export, tmp_path, pretrained=False)
    with pytest.raises(ValueError, match="vision_tower: its weights were random"):
        export_checkpoint(qwen_export.checkpoints, tmp_path / "out", yaml=changed)


@pytest.mark.parametrize("kind", ["bloom", "mamba", "gemma3_text"])
def test_an_export_loads_whatever_attention_its_language_model_has(kind, shards, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}
    sizes |= {
        "bloom": {"n_head": 4},
        "mamba": {"state_size": 8},
        "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    }[kind]
    config = CONFIG_MAPPING[kind](**sizes, pad_token_id=0)
    exported = train_and_export(
        tmp_path, shards, tiny_siglip, lambda: AutoModelForCausalLM.from_config(config)
    )
    whole = export_checkpoint(exported.checkpoints, tmp_path / "whole", with_towers=True)
    for folder in (exported.folder, whole):
        model, processor = load_export(folder, device="cpu")
        found = torch.cat(
            [
                model(**processor([str(picture)], prompt, [answer])).logits[0, -1 - length : -1]
                for picture, prompt, answer, length in zip(
                    exported.pictures, PROMPTS, ANSWERS, lengths(exported), strict=True
                )
            ]
        )
        assert close(found, exported.answer_logits().logits)
        assert len(caption_images(model, processor, [str(exported.pictures[0])])) == 1


def lengths(exported):
    """Answer tokens of each sample, end-of-text included."""
    return [len(exported.template.tokenize([answer])[0]) + 1 for answer in ANSWERS]


def test_a_tokenizer_that_is_not_the_export_s_is_refused(qwen_export, tmp_path):
    moved = shutil.copytree(qwen_export.folder, tmp_path / "moved")
    tokenizer = AutoTokenizer.from_pretrained(moved)
    tokenizer.add_tokens([f"word{index}" for index in range(99)])
    tokenizer.save_pretrained(moved)
    with pytest.raises(ValueError, match=r"has 357 tokens with ids up to 357 .* has 300 rows"):
        load_export(moved, device="cpu")
