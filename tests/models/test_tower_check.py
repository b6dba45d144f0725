"""Which architectures can be towers: those that pass are exact, the others are told in a line."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from tiny import packed
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.tower_check import check_language_model, check_vision_model
from vlm_composer.models.tower_loading import load_language_model, read_config
from vlm_composer.models.vision_tower import VisionTower

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
VISION = SIZES | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 300, "num_attention_heads": 4, "max_position_embeddings": 128}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = GROUPED | {"num_local_experts": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}
SWIN |= {"window_size": 4}
RECURRENT = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}
FALCON_H1 = GROUPED | {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16}
FALCON_H1 |= {"mamba_chunk_size": 8, "mamba_n_groups": 1}

IMAGE_TOWERS = {
    **dict.fromkeys(("siglip_vision_model", "clip_vision_model", "vit", "deit"), VISION),
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "beit", "ijepa"), VISION),
    **dict.fromkeys(("idefics3_vision", "smolvlm_vision"), VISION),
}
NO_IMAGE_TOWERS = {
    "convnext": ({}, "no hidden_size"),
    "pixtral": (VISION, "gave (1, 16, 64) for 2 images, and patches (2, 16, 64) are needed"),
    "internvl_vision": (VISION, "image_size (32, 32), and one number is needed"),
    "vit_mae": (VISION, "gave 5 tokens for 16 patches"),
    "swin": (SWIN, "gave 16 tokens for 64 patches"),
    "sam_vision_model": (VISION, "gave (2, 16, 4, 4) for 2 images"),
    "videomae": (VISION, "does not run on images of 32 × 32 pixels alone"),
    "qwen3": (GROUPED, "no image_size"),
}
DECODERS = {
    **dict.fromkeys(("qwen3", "qwen2", "llama", "mistral", "gemma3_text", "glm4"), GROUPED),
    **dict.fromkeys(("gpt_neox", "phi", "opt", "bloom", "gptj"), TEXT),
    **dict.fromkeys(("mixtral", "llama4_text"), EXPERTS),
    **dict.fromkeys(("mamba", "falcon_mamba"), RECURRENT),
    "falcon_h1": FALCON_H1,
}
NO_DECODERS = {
    "gemma2": (GROUPED, "changes its logits after its head (final_logit_softcapping = 30.0)"),
    "cohere": (GROUPED, "changes its logits after its head (logit_scale = 0.0625)"),
    "falcon_h1": (
        FALCON_H1 | {"lm_head_multiplier": 0.5},
        "its logits are more than a linear head's (mul), which training would leave out",
    ),
    "bert": (TEXT, "it is not causal (is_decoder: False)"),
    "bert-generation": (TEXT, "it is not causal (is_decoder: False)"),
    "xlnet": ({"d_model": 64, "n_head": 4, "n_layer": 2}, "(attn_type: bi)"),
    "falcon_h1 by its table": (
        FALCON_H1 | {"embedding_multiplier": 2.0},
        "its embeddings are more than rows of a table (mul), which training would leave out",
    ),
    "rwkv": (RECURRENT, "changes its own weights"),
    "prophetnet": (
        {"vocab_size": 300, "hidden_size": 64, "num_decoder_layers": 2, "decoder_ffn_dim": 96},
        "its logits are more than a linear head's (mm)",
    ),
    "openai-gpt": ({"n_embd": 64, "n_head": 4, "n_layer": 2}, "does not run on embeddings"),
}


def config_of(kind, settings):
    if kind == "opt":
        settings = settings | {"ffn_dim": 96, "word_embed_proj_dim": 64}
    if kind == "gptj":
        settings = {"vocab_size": 300, "n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}
    if kind == "bloom":
        settings = {"vocab_size": 300, "hidden_size": 64, "n_head": 4, "n_layer": 2}
    return CONFIG_MAPPING[kind](**settings)


def assert_one_line(text, name, kind, part, why):
    assert "\n" not in text
    assert text.startswith(f"{name} is a {kind} (")
    assert f"), which cannot be a {part} here: " in text
    assert why in text
    assert "; use a " in text
    for raw in ("object has no attribute", "unexpected keyword", "Error", "Traceback"):
        assert raw not in text


@pytest.mark.parametrize("kind", IMAGE_TOWERS)
def test_a_vision_tower_that_passes_gives_a_token_for_each_patch(kind):
    config = config_of(kind, IMAGE_TOWERS[kind])
    check_vision_model("it", config)
    tower = VisionTower(AutoModel.from_config(config))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    patches = tower(pixels)
    assert patches.shape == (2, 16, 64)
    for patch in (0, 5, 15):  # what stands at a patch depends most on its own pixels
        row, column = 8 * (patch // 4), 8 * (patch % 4)
        changed = pixels.clone()
        changed[:, :, row : row + 8, column : column + 8] ^= 255
        moved = (tower(changed) - patches).norm(dim=-1)
        assert moved.argmax(dim=1).tolist() == [patch, patch]


@pytest.mark.parametrize("kind", NO_IMAGE_TOWERS)
def test_a_model_that_gives_no_patches_is_refused_in_a_line(kind):
    settings, why = NO_IMAGE_TOWERS[kind]
    with pytest.raises(ValueError, match="cannot be a vision tower") as refused:
        check_vision_model("it", config_of(kind, settings))
    assert_one_line(str(refused.value), "it", kind, "vision tower", why)


def test_naflex_is_refused_in_a_line():
    config = CONFIG_MAPPING["siglip2"]().vision_config
    with pytest.raises(ValueError, match=r"it is a siglip2_vision_model, .* no vision model for"):
        check_vision_model("it", config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 4}, "layer 4: a model of 3 layers has hidden states -4 to 3"),
        ({"image_size": 7}, "image_size 7 is less than one patch of 8 pixels; set a multiple"),
        ({"attn_implementation": "flash"}, r"configuration \{'attn_implementation': 'flash'\}"),
    ],
)
def test_a_setting_that_does_not_suit_a_vision_tower(options, message):
    config = config_of("siglip_vision_model", VISION)
    check_vision_model("it", config, layer=-2, image_size=48, attn_implementation="eager")
    with pytest.raises(ValueError, match=message):
        check_vision_model("it", config, **options)


def test_an_image_size_that_a_model_cannot_take_names_its_own():
    with pytest.raises(ValueError, match=r"images of 48 × 48 pixels alone \(its own are 32 × 32\)"):
        check_vision_model("it", config_of("idefics3_vision", VISION), image_size=48)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_language_model_that_passes_is_exact(kind):
    """Logits and gradients of two samples at once are those of Hugging Face for each alone."""
    config = config_of(kind, DECODERS[kind])
    assert check_language_model("it", config) == 300
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = [torch.randint(3, 250, (length,)) for length in (9, 5)]
    rows = [model.get_input_embeddings()(row).clone().requires_grad_() for row in ids]
    expected = [model(inputs_embeds=row[None], use_cache=False).logits[0, :-1] for row in rows]
    weights = [torch.randn_like(logits) for logits in expected]
    theirs = torch.autograd.grad(
        sum((x * w).sum() for x, w in zip(expected, weights, strict=True)), rows
    )
    llm = LanguageModel(model)
    logits = llm.head(llm.decode(torch.cat(rows), packed(ids, ids)))
    ours = torch.autograd.grad((logits * torch.cat(weights)).sum(), rows)
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-5)
    difference = (torch.cat(ours) - torch.cat(theirs)).norm()
    assert difference <= 1e-5 * torch.cat(theirs).norm()


@pytest.mark.parametrize("kind", NO_DECODERS)
def test_a_model_through_which_nothing_is_trained_is_refused_in_a_line(kind):
    settings, why = NO_DECODERS[kind]
    kind = kind.partition(" ")[0]
    with pytest.raises(ValueError, match="cannot be a language model") as refused:
        check_language_model("it", config_of(kind, settings))
    assert_one_line(str(refused.value), "it", kind, "language model", why)


def test_a_model_that_is_imported_from_what_is_not_installed():
    with pytest.raises(ValueError, match="not installed: TimmWrapperModel requires the timm lib"):
        check_language_model("it", CONFIG_MAPPING["gemma3n"]())


def test_the_check_draws_nothing_and_takes_any_default_device():
    before = torch.get_rng_state()
    config = config_of("clip_vision_model", VISION | {"projection_dim": 8})  # draws in __init__
    with torch.device("meta"):
        check_vision_model("it", config)
        check_language_model("it", config_of("qwen3", GROUPED | {"vocab_size": 301}))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_a_model_without_sdpa_is_loaded_with_its_own_attention(kind, tmp_path):
    saved = AutoModelForCausalLM.from_config(config_of(kind, DECODERS[kind])).eval()
    saved.save_pretrained(tmp_path)
    llm = LanguageModel(load_language_model(str(tmp_path), pretrained=True, dtype=torch.float32))
    ids = torch.randint(3, 250, (1, 6))
    expected = saved.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(llm.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize(("kind", "text"), [("gemma3", GROUPED), ("llama4", EXPERTS)])
def test_a_model_of_images_and_text_gives_its_text_half(kind, text, tmp_path):
    from transformers import AutoModelForImageTextToText

    vision = VISION if kind == "gemma3" else SIZES | {"num_attention_heads": 4, "image_size": 28}
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    half = read_config(str(tmp_path), "text_config")
    assert half.model_type == f"{kind}_text"
    check_language_model("it", half)
    model = load_language_model(str(tmp_path), pretrained=True, dtype=torch.float32)
    ids = torch.randint(3, 250, (1, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(input_ids=ids).logits)
