"""Captions: what the language model says of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vlm_composer.data.template import Template
from vlm_composer.models.packing import IGNORE_INDEX, pack
from vlm_composer.models.vlm import VisionLanguageModel


class OneCache(DynamicCache):
    """A KV cache that stays one object under FSDP2.

    FSDP2 casts what a module is called with, and takes apart and builds anew every container that
    torch's pytree knows, a DynamicCache of transformers 4.53 among them: each layer would write
    into a copy that nobody reads. A subclass is not known to it.
    """


@torch.no_grad()
def caption_images(
    model: VisionLanguageModel,
    template: Template,
    images: Tensor,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int = 32,
    in_step: bool = False,
) -> list[str]:
    """Caption images by greedy decoding with a KV cache.

    Args:
        model: With its connector trained.
        template: The one of the training.
        images: uint8 RGB (B, 3, S, S), or the vision tower's patches of them (B, N, V).
        prompt: Text with one `<image>`, the same for all images, or one for each. Prompts of
            different lengths are padded on the left.
        max_new_tokens: Longest caption in tokens.
        in_step: Go on until the captions of all ranks have ended, which must all call this with
            some image: ranks that share weights (FSDP2) run every layer together.

    Returns:
        B captions, without end-of-text.
    """
    prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
    prompt_ids = [torch.tensor(template.encode_prompt(text)) for text in prompts]
    rows = pack(
        prompt_ids,
        [torch.full_like(ids, IGNORE_INDEX) for ids in prompt_ids],
        image_token_id=model.image_token_id,
        device=images.device,
    )
    embeds_ND = model.build_inputs_embeds(rows, model.image_tokens(images))
    # The last token of every prompt stands at the end, where its caption goes on.
    samples = embeds_ND.split(rows.lengths)
    masks = [sample.new_ones(len(sample), dtype=torch.long) for sample in samples]
    eos_token_id = template.tokenizer.eos_token_id
    generated = model.language_model.generate(
        inputs_embeds=pad_sequence(list(samples), batch_first=True, padding_side="left"),
        attention_mask=pad_sequence(masks, batch_first=True, padding_side="left"),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        # It stands for a place in an image, and no text may have it.
        suppress_tokens=[model.image_token_id],
        use_cache=True,
        synced_gpus=in_step,
        **({"past_key_values": OneCache()} if in_step else {}),
    )
    texts = template.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [text.strip() for text in texts]
