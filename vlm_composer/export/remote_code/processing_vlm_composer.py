"""Pictures and prompts to what the model reads, by the template of the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from vlm_composer.data.schema import IMAGE_PLACEHOLDER
from vlm_composer.data.template import Template
from vlm_composer.models.ignore_index import IGNORE_INDEX


class VLMComposerProcessor(ProcessorMixin):
    r"""Image processor and tokenizer in one.

    Args:
        image_processor: Of the vision tower.
        tokenizer: Of the language model, with `<image_patch>`.
        num_image_tokens: `<image_patch>` tokens an image (K).
        add_bos: Begin with the tokenizer's start token; None does what the tokenizer itself does.
        max_seq_len: Longest sample in tokens; longer answers are cut.
        default_prompt: What is asked where no text is given.
        chat_template: transformers' own; there is none.
    """

    attributes: Any = ["image_processor", "tokenizer"]  # noqa: RUF012
    image_processor_class: Any = "AutoImageProcessor"
    tokenizer_class: Any = "AutoTokenizer"
    image_processor: Any
    tokenizer: Any
    auto_map: Any

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 64,
        add_bos: bool | None = None,
        max_seq_len: int = 2048,
        default_prompt: str = f"{IMAGE_PLACEHOLDER}\nDescribe the image.",
        chat_template: Any = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.num_image_tokens = num_image_tokens
        self.add_bos = add_bos
        self.max_seq_len = max_seq_len
        self.default_prompt = default_prompt

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        answers: Sequence[str] | None = None,
        padding_side: str = "left",
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        r"""Make a batch.

        Args:
            images: One picture or B, as the image processor takes them.
            text: A prompt for all, or B; each with one `<image>`, which is appended on a line of
                its own where it is missing, as in the training data. None asks the default prompt.
            answers: B answers, to take a loss of; an end-of-text follows each.
            padding_side: "left", as `generate` needs, or "right".
            return_tensors: Only "pt".
            **kwargs: `padding` is accepted and always on; no other is known.

        Returns:
            `input_ids`, `attention_mask` (B, T), `pixel_values` (B, 3, S, S); with answers also
            `labels` (B, T), -100 where no loss is taken.

        Raises:
            ValueError: There are not as many prompts as pictures, or a prompt has several
                `<image>`.
        """
        kwargs.pop("padding", None)
        if kwargs or return_tensors != "pt" or images is None:
            raise ValueError(
                f"{sorted(kwargs)}, return_tensors={return_tensors!r}: give images, text, answers; "
                "tensors of torch are returned"
            )
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        count = len(pixel_values)
        text = self.default_prompt if text is None else text
        prompts = [text] * count if isinstance(text, str) else list(text)
        if len(prompts) != count or (answers is not None and len(answers) != count):
            answered = "" if answers is None else f", {len(answers)} answers"
            raise ValueError(f"{count} images, {len(prompts)} prompts{answered}: give as many")
        template = Template(
            self.tokenizer,
            num_image_tokens=self.num_image_tokens,
            max_seq_len=self.max_seq_len,
            add_bos=self.add_bos,
        )
        prompts = [with_placeholder(prompt) for prompt in prompts]
        ids, labels = [], []
        for index, prompt in enumerate(prompts):
            if answers is None:
                ids.append(list(template.encode_prompt(prompt)))
            else:
                sample = template.encode(prompt, answers[index])
                ids.append(sample.input_ids)
                labels.append(sample.labels)
        pad = self.tokenizer.pad_token_id
        batch = {
            "input_ids": _padded(
                ids, self.tokenizer.eos_token_id if pad is None else pad, padding_side
            ),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0, padding_side),
            "pixel_values": pixel_values,
        }
        if answers is not None:
            batch["labels"] = _padded(labels, IGNORE_INDEX, padding_side)
        return BatchFeature(batch)

    def captions_of(self, generated: Tensor, batch: Any) -> list[str]:
        """Decode what `generate` wrote behind the prompts of `batch`."""
        new = generated[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.batch_decode(new, skip_special_tokens=True)]

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch."""
        return ["input_ids", "attention_mask", "pixel_values"]


def with_placeholder(prompt: str) -> str:
    """Append `<image>` on a line of its own to a prompt that has none."""
    if IMAGE_PLACEHOLDER in prompt:
        return prompt
    on_new_line = not prompt or prompt.endswith("\n")
    return prompt + (IMAGE_PLACEHOLDER if on_new_line else f"\n{IMAGE_PLACEHOLDER}")


def _padded(rows: list[list[int]], value: int, side: str) -> Tensor:
    longest = max(map(len, rows))
    pads = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(rows, pads, strict=True)
    return torch.tensor([pad + row if side == "left" else row + pad for row, pad in pairs])
