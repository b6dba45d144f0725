"""Captions are what greedy decoding without a cache gives, and batches change nothing."""

import pytest
import torch

from tiny import byte_tokenizer, make_likeliest, tiny_llama, tiny_qwen3, tiny_siglip
from vlm_composer.data.template import Template
from vlm_composer.evaluation.captioning import caption_images
from vlm_composer.models.connector import Connector
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.packing import IGNORE_INDEX, pack
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.models.vlm import VisionLanguageModel


def greedy(model, template, image, prompt, steps):
    """One token at a time, the whole sequence anew each time."""
    ids = list(template.encode_prompt(prompt))
    start = len(ids)
    with torch.no_grad():
        tokens = model.connector(model.vision_tower(image[None]))
        for _ in range(steps):
            row = torch.tensor([*ids, 0])  # a token that the last one is asked for
            labels = torch.full_like(row, IGNORE_INDEX)
            labels[-1] = 0
            rows = pack([row], [labels], image_token_id=model.image_token_id)
            hidden = model.language_model.decode(model.build_inputs_embeds(rows, tokens), rows)
            logits = model.language_model.head(hidden)
            logits[:, model.image_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == template.tokenizer.eos_token_id:
                break
    return template.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def model_of(llm):
    template = Template(byte_tokenizer(), num_image_tokens=4, max_seq_len=64)
    model = VisionLanguageModel(
        VisionTower(tiny_siglip()),
        Connector(
            PerceiverResampler(48, num_latents=4, depth=2, num_heads=2, head_dim=16),
            MLPProjector(32, 64, mlp_ratio=4),
        ),
        LanguageModel(llm()),
        template.image_token_id,
    ).eval()
    with torch.no_grad():
        model.connector.projector.fc2.weight.mul_(20)  # so that images differ
    return model, template


@pytest.mark.parametrize("llm", [tiny_qwen3, tiny_llama])
def test_captions_equal_decoding_token_by_token(llm):
    model, template = model_of(llm)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    captions = caption_images(model, template, images, "<image>\nWhat?", max_new_tokens=9)
    assert captions == [greedy(model, template, i, "<image>\nWhat?", 9) for i in images]
    assert len(set(captions)) > 1


@pytest.mark.parametrize("llm", [tiny_qwen3, tiny_llama])
def test_prompts_of_different_lengths_change_nothing(llm):
    model, template = model_of(llm)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    prompts = ["<image>\nWhat?", "Look at this, and say what it is: <image>", "<image>"]
    captions = caption_images(model, template, images, prompts, max_new_tokens=9)
    assert captions == [
        greedy(model, template, image, prompt, 9)
        for image, prompt in zip(images, prompts, strict=True)
    ]


@pytest.mark.parametrize("llm", [tiny_qwen3, tiny_llama])
def test_the_image_token_is_never_said(llm):
    model, template = model_of(llm)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    captions = caption_images(model, template, images, "<image>\nWhat?", max_new_tokens=9)
    make_likeliest(
        model.image_token_id,
        model.language_model.model.get_output_embeddings(),
        lambda: caption_images(model, template, images, "<image>\nWhat?", max_new_tokens=1),
    )
    assert captions == caption_images(model, template, images, "<image>\nWhat?", max_new_tokens=9)
