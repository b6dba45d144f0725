"""Towers: frozen, cut at the chosen layer, free of what is never run, equal to Hugging Face's
own."""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, SiglipImageProcessor

from tiny import packed, save_tower, tiny_dinov2, tiny_llama, tiny_qwen3, tiny_siglip
from vlm_composer.data.images import decode_image
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.tower_loading import (
    load_language_model,
    load_vision_model,
    read_config,
)
from vlm_composer.models.vision_tower import VisionTower


def load_vision(folder, dtype=torch.float32, **options):
    return VisionTower(load_vision_model(str(folder), pretrained=True, dtype=dtype), **options)


def load_llm(folder, dtype=torch.float32):
    return LanguageModel(load_language_model(str(folder), pretrained=True, dtype=dtype))


def test_the_full_size_towers_have_the_specified_parameters():
    with torch.device("meta"):
        vision = load_vision_model(
            "google/siglip2-so400m-patch14-384", pretrained=False, dtype=torch.bfloat16
        )
        llm = load_language_model("Qwen/Qwen3-8B-Base", pretrained=False, dtype=torch.bfloat16)
        tower = VisionTower(vision)
    assert sum(p.numel() for p in tower.parameters()) == 412_987_248
    assert sum(p.numel() for p in llm.parameters()) == 8_190_735_360
    assert (tower.num_patches, tower.hidden_size, tower.image_size) == (729, 1152, 384)
    assert llm.get_input_embeddings().weight.shape == (151_936, 4096)
    assert llm.get_input_embeddings().weight is not llm.get_output_embeddings().weight


@pytest.mark.parametrize(("name", "num_prefix"), [("siglip", 0), ("dinov2", 1)])
@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 3])
def test_a_layer_is_that_of_hugging_face_without_class_tokens(towers, name, num_prefix, layer):
    tower = load_vision(towers / name, layer=layer)
    pixels = torch.randint(0, 256, (2, 3, tower.image_size, tower.image_size), dtype=torch.uint8)
    whole = AutoModel.from_pretrained(towers / name).eval()
    with torch.no_grad():
        output = whole((pixels.float() / 255 - 0.5) / 0.5, output_hidden_states=True)
    expected = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    patches = tower(pixels)
    assert patches.shape == (2, tower.num_patches, tower.hidden_size)
    torch.testing.assert_close(patches, expected[:, num_prefix:], rtol=1e-5, atol=1e-5)


def test_layers_above_the_chosen_one_and_the_pooling_head_are_gone(towers):
    names = [name for name, _ in load_vision(towers / "siglip", layer=1).named_parameters()]
    assert any("layers.0." in name for name in names)
    assert not any(
        "layers.1." in name or "head" in name or "post_layernorm" in name for name in names
    )


def test_register_tokens_are_dropped(tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=42, patch_size=14,
        num_register_tokens=4, mlp_ratio=2,
    )  # fmt: skip
    model = Dinov2WithRegistersModel(config)
    save_tower(model, tmp_path / "registers")
    tower = load_vision(tmp_path / "registers")
    pixels = torch.randint(0, 256, (1, 3, 42, 42), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.eval()((pixels.float() / 255 - 0.5) / 0.5).last_hidden_state[:, 5:]
    torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "size", "patches"), [("siglip", 48, 36), ("dinov2", 28, 4)])
def test_another_image_size_interpolates_the_positions(towers, name, size, patches):
    tower = load_vision(towers / name, image_size=size)
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    assert tower(pixels).shape == (1, patches, 48)


def test_pixels_are_normalised_as_the_image_processor_does(towers):
    processor = SiglipImageProcessor.from_pretrained(towers / "siglip")
    image = Image.effect_noise((57, 41), 80).convert("RGB")
    expected = processor(image, return_tensors="pt").pixel_values
    tower = load_vision(towers / "siglip")
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = decode_image(buffer.getvalue(), 32, decoder="pil")[None]
    ours = (pixels.float() / 255 - tower.image_mean) / tower.image_std
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 31, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_size_are_refused(towers, shape):
    with pytest.raises(ValueError, match=r"takes \(B, 3, 32, 32\)"):
        load_vision(towers / "siglip")(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("layer", [4, -5, 99])
def test_a_layer_that_does_not_exist_is_refused(towers, layer):
    with pytest.raises(ValueError, match="hidden states -4 to 3"):
        load_vision(towers / "siglip", layer=layer)


def test_towers_are_frozen_and_stay_in_eval_mode(towers):
    for tower in (load_vision(towers / "dinov2"), load_llm(towers / "llama")):
        parent = torch.nn.Sequential(tower).train()
        assert parent.training
        assert not any(module.training for module in tower.modules())
        assert not any(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_packed_rows_equal_single_rows(towers, name):
    llm = load_llm(towers / name)
    whole = AutoModelForCausalLM.from_pretrained(towers / name, attn_implementation="eager").eval()
    rows = [torch.randint(0, 256, (n,)) for n in (7, 3, 5)]
    together = packed(rows, rows)
    hidden = llm.decode(llm.embed(together.input_ids), together)
    for row, states in zip(rows, hidden.split([6, 2, 4]), strict=True):
        expected = whole(row[None]).logits[0, :-1]
        torch.testing.assert_close(llm.head(states), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_stored_in_the_dtype_asked_for(towers, dtype):
    for tower in (load_vision(towers / "siglip", dtype), load_llm(towers / "qwen3", dtype)):
        assert {p.dtype for p in tower.parameters()} == {dtype}
        assert all(b.dtype != torch.bfloat16 for b in tower.buffers())


def test_a_bf16_tower_computes_in_bf16_under_autocast(towers):
    llm = load_llm(towers / "qwen3", torch.bfloat16)
    seen = []
    norm = llm.model.base_model.norm
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        llm.decode(llm.embed(torch.tensor([1, 2, 3])), packed([[1, 2, 3]]))
    assert seen == [torch.bfloat16]


def test_missing_weights_are_refused(tmp_path):
    model = tiny_qwen3()
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "holes", state_dict=state)
    with pytest.raises(
        ValueError, match=r"lacks 1 weights .* model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_language_model(str(tmp_path / "holes"), pretrained=True, dtype=torch.float32)


def test_a_two_tower_checkpoint_gives_its_vision_half(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    vision = tiny_siglip().config.to_dict()
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50,
            "num_attention_heads": 4, "projection_size": 48}  # fmt: skip
    both = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    both.save_pretrained(tmp_path / "both")
    tower = load_vision(tmp_path / "both")
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = both.vision_model((pixels.float() / 255 - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_llama])
def test_a_table_without_spare_rows_grows_by_frozen_mean_rows(build):
    llm = LanguageModel(build())
    before = llm.model.get_input_embeddings().weight.clone()
    assert not llm.ensure_rows(300)
    assert llm.ensure_rows(301)
    for table in (llm.model.get_input_embeddings(), llm.model.get_output_embeddings()):
        assert table.weight.shape[0] == 301
        assert not table.weight.requires_grad
    weight = llm.model.get_input_embeddings().weight
    assert torch.equal(weight[:300], before)
    torch.testing.assert_close(weight[300], before.mean(dim=0))
    tied = llm.model.config.tie_word_embeddings
    assert (weight is llm.model.get_output_embeddings().weight) == tied


def test_a_model_that_changes_its_logits_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"final_logit_softcapping = 30\.0"):
        LanguageModel(Gemma2ForCausalLM(config))


def test_random_weights_follow_the_seed_and_the_overrides():
    def build():
        torch.manual_seed(5)
        return load_language_model(
            "Qwen/Qwen3-8B-Base", pretrained=False, dtype=torch.float32,
            overrides={"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 99,
                       "intermediate_size": 32, "num_attention_heads": 2,
                       "num_key_value_heads": 1, "head_dim": 8},
        )  # fmt: skip

    first, second = build(), build()
    assert first.config.num_hidden_layers == len(first.model.layers) == 1
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_an_override_that_the_configuration_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"config_overrides\.num_layers: .* no such attribute"):
        read_config("Qwen/Qwen3-8B-Base", "text_config", overrides={"num_layers": 2})


def test_a_tower_that_pools_its_patches_is_refused():
    class Pooling(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, pixels):
            output = self.model(pixels)
            output.last_hidden_state = output.last_hidden_state.mean(1, keepdim=True)
            return output

    tower = VisionTower(Pooling(tiny_dinov2()))
    with pytest.raises(ValueError, match="gave 1 tokens for 9 patches"):
        tower(torch.zeros(1, 3, 42, 42, dtype=torch.uint8))
