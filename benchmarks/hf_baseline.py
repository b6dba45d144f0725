"""The trainer that a user would pick instead: transformers' Trainer and Llava, on the same pairs.

Frozen towers in bf16, the connector in fp32 under autocast, padded rows with an attention mask; all
in fp32 where the machine has no bf16.
What costs it nothing is taken from our side: the decoder keeps no cache, AdamW is the fused one,
and images are decoded by our own function, which is faster than Hugging Face's slow processor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3ForCausalLM,
    SiglipVisionModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.faithful_towers import (
    DTYPE,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MAX_SEQ_LEN,
    TORCH_DTYPE,
    Shape,
    build_connector,
)
from vlm_composer.data.images import decode_image
from vlm_composer.data.template import IGNORE_INDEX, Template

IMAGE_MEAN, IMAGE_STD = 0.5, 0.5
"""SigLIP's, for pixels in [0, 1]."""


def build_llava(
    shape: Shape,
    towers: Path,
    image_token_id: int,
    *,
    dtype: torch.dtype = TORCH_DTYPE,
    attn_implementation: str = "sdpa",
) -> LlavaForConditionalGeneration:
    """Load the towers of `write_towers` into a Llava with our connector.

    Args:
        shape: Of the towers.
        towers: Their folder.
        image_token_id: Id that image tokens replace.
        dtype: Storage of the towers; the connector is fp32.
        attn_implementation: transformers' name of the attention function.

    Returns:
        The model, towers frozen.
    """
    options: dict[str, Any] = {"torch_dtype": dtype, "attn_implementation": attn_implementation}
    vision = SiglipVisionModel.from_pretrained(towers / "siglip", **options)
    text = Qwen3ForCausalLM.from_pretrained(towers / "qwen3", **options)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=shape.num_latents,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower, llava.model.language_model = vision, text.model
    llava.lm_head = text.lm_head
    connector = build_connector(shape)
    connector.load_state_dict(torch.load(towers / "connector.pt"))
    llava.requires_grad_(False)
    llava.model.multi_modal_projector = connector
    for parameter in llava.parameters():
        parameter.detach().sum()  # a mapped file's page is resident once it was read
    # As LLaVA's own train.py does. It matters: Qwen3 would fill a cache in every forward.
    llava.config.use_cache = llava.config.text_config.use_cache = False
    return llava.train()


def compile_decoder_layers(llava: LlavaForConditionalGeneration, backend: str) -> None:
    """Compile each decoder layer in place, for rows of any length."""
    torch._dynamo.config.recompile_limit = 64  # twelve layers share one code object
    for layer in llava.model.language_model.layers:
        layer.compile(dynamic=True, backend=backend)


class NormalisedPairs(Dataset[dict[str, Tensor]]):
    """The pairs of `write_pairs` in their order, read lazily from the JSON and the image folder.

    Args:
        data: Folder of `write_pairs`.
        template: Makes ids and labels.
        image_size: Side S in pixels.
    """

    def __init__(self, data: Path, template: Template, image_size: int) -> None:
        self.items: list[Any] = json.loads((data / "pairs.json").read_text())
        self.images = data / "images"
        self.template = template
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `pixel_values` fp32 (3, S, S), normalised as Hugging Face's processor does,
        `input_ids` and `labels` (T,)."""
        item = self.items[index]
        prompt, answer = (turn["value"] for turn in item["conversations"])
        text = self.template.encode(prompt, answer)
        pixels = decode_image((self.images / item["image"]).read_bytes(), self.image_size)
        return {
            "pixel_values": (pixels.float() / 255 - IMAGE_MEAN) / IMAGE_STD,
            "input_ids": torch.tensor(text.input_ids),
            "labels": torch.tensor(text.labels),
        }


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad samples on the right, with an attention mask, for a Llava."""
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    return {
        "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
        "input_ids": pad_sequence([s["input_ids"] for s in samples], batch_first=True),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": pad_sequence(
            [s["labels"] for s in samples], batch_first=True, padding_value=IGNORE_INDEX
        ),
    }


def read_template(shape: Shape, towers: Path) -> Template:
    """The template of the tokenizer beside the language model."""
    return Template(
        AutoTokenizer.from_pretrained(towers / "qwen3"),
        num_image_tokens=shape.num_latents,
        max_seq_len=MAX_SEQ_LEN,
    )


class _InOrder(Trainer):
    """Takes the samples in their order and keeps the losses."""

    def __init__(self, *args: Any, losses: list[float], **options: Any) -> None:
        super().__init__(*args, **options)
        self._losses = losses

    def _get_train_sampler(self, *args: Any, **options: Any) -> SequentialSampler:
        assert self.train_dataset is not None
        return SequentialSampler(self.train_dataset)  # its own shuffles, whatever it is told

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        self._losses.append(float(loss))
        return loss


def build_trainer(
    shape: Shape,
    towers: Path,
    data: Path,
    out: Path,
    microbatch_size: int,
    *,
    compile_backend: str | None,
    callback: TrainerCallback,
    losses: list[float],
) -> Trainer:
    """Build the Trainer, with the optimizer settings of `training_yaml`.

    Args:
        shape: Of the towers.
        towers: Folder of `write_towers`.
        data: Folder of `write_pairs`.
        out: Folder the Trainer may write to.
        microbatch_size: Samples of a step.
        compile_backend: torch.compile's, for each decoder layer; None compiles none.
        callback: Told of every step.
        losses: Every step's loss is appended to it.

    Returns:
        A Trainer that is ready for `train()`.
    """
    template = read_template(shape, towers)
    llava = build_llava(shape, towers, template.image_token_id)
    if compile_backend is not None:
        compile_decoder_layers(llava, compile_backend)
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=microbatch_size,
        max_steps=100_000,  # it is stopped from outside
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        bf16=DTYPE == "bf16",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
    )
    return _InOrder(
        model=llava,
        args=arguments,
        train_dataset=NormalisedPairs(data, template, shape.image_size),
        data_collator=collate,
        callbacks=[callback],
        losses=losses,
    )
