"""Captions: what the language model says of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_composer.data.template import Template
from vlm_composer.models.packing import IGNORE_INDEX, pack
from vlm_composer.models.vlm import VisionLanguageModel


@torch.no_grad()
def caption_images(
    model: VisionLanguageModel,
    template: Template,
    images: Tensor,
    prompt: str,
    *,
    max_new_tokens: int = 32,
) -> list[str]:
    """Caption images by greedy decoding with a KV cache.

    Args:
        model: With its connector trained.
        template: The one of the training.
        images: uint8 RGB (B, 3, S, S), or the vision tower's patches of them (B, N, V).
        prompt: Text with one `<image>`, the same for all images.
        max_new_tokens: Longest caption in tokens.

    Returns:
        B captions, without end-of-text.
    """
    prompt_ids = torch.tensor(template.encode_prompt(prompt))
    num_images = images.shape[0]
    rows = pack(
        [prompt_ids] * num_images,
        [torch.full_like(prompt_ids, IGNORE_INDEX)] * num_images,
        image_token_id=model.image_token_id,
        device=images.device,
    )
    image_tokens = model.connector(model.patches_of(images))
    inputs_embeds = rows.pad(model.build_inputs_embeds(rows, image_tokens))
    eos_token_id = template.tokenizer.eos_token_id
    generated = model.language_model.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=torch.ones(inputs_embeds.shape[:2], device=inputs_embeds.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        use_cache=True,
    )
    texts = template.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [text.strip() for text in texts]
