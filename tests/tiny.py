"""Tiny real towers with random weights, a byte tokenizer, coloured pairs, random batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from vlm_composer.models.packing import IGNORE_INDEX, PackedRows, pack

IMAGE = 299
"""Id of the image token in `batch_of`."""
K = 4
"""Tokens an image in `batch_of`."""


def tiny_qwen3(**changes: Any) -> Qwen3ForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 257,
    }
    return _spread_out(Qwen3ForCausalLM(Qwen3Config(**settings | changes)))


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return _spread_out(LlamaForCausalLM(LlamaConfig(**settings | changes)))


def tiny_siglip(**changes: Any) -> SiglipVisionModel:
    settings: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return SiglipVisionModel(SiglipVisionConfig(**settings | changes))


def tiny_dinov2(**changes: Any) -> Dinov2Model:
    settings: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "image_size": 42,
        "patch_size": 14,
    }
    return Dinov2Model(Dinov2Config(**settings | changes))


def _spread_out(model: Any) -> Any:
    """Widen the random weights, so that the output depends on the input as in a trained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


def make_likeliest(token_id: int, head: torch.nn.Module, generate: Callable[[], Any]) -> None:
    """Change a head so that `generate` would begin with a token, if it may."""
    hidden: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    generate()
    hook.remove()
    assert isinstance(head.weight, torch.Tensor)
    with torch.no_grad():
        head.weight[token_id] = 100 * hidden[0][0, -1]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: ids 0–255 are bytes, 256 `<eos>`, 257 `<bos>`, which it does not
    add."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>"
    )


def save_tower(model: PreTrainedModel, folder: Path) -> Path:
    """Save a tower as a user would have it, with what comes beside the weights."""
    model.save_pretrained(folder)
    if hasattr(model.config, "patch_size"):
        side = model.config.image_size
        SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    else:
        byte_tokenizer().save_pretrained(folder)
    return folder


COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 230), "white": (250,) * 3}


def write_pairs(folder: Path, count: int, prefix: str = "s") -> tuple[Path, Path]:
    """Write a LLaVA JSON of plain-coloured images whose answers name the colour; ids are `prefix`
    and a number."""
    images = folder / "images"
    images.mkdir(parents=True)
    items = []
    for index in range(count):
        name, colour = list(COLOURS.items())[index % len(COLOURS)]
        Image.new("RGB", (20 + index % 7, 16 + index % 5), colour).save(images / f"{index}.png")
        prompt = ("<image>\nColour?", "What colour is it?\n<image>")[index % 2]
        answer = f"a {name} picture" if index % 3 else name
        items.append(
            {
                "id": f"{prefix}{index}",
                "image": f"{index}.png",
                "conversations": [
                    {"from": "human", "value": prompt},
                    {"from": "gpt", "value": answer},
                ],
            }
        )
    (folder / "pairs.json").write_text(json.dumps(items))
    return folder / "pairs.json", images


def batch_of(rows, image_size=32):
    """Rows are (text before, text after, answer) lengths; returns pixels, ids and labels a row."""
    ids, labels = [], []
    for before, after, answer in rows:
        text = torch.randint(0, 256, (before + K + after + answer,))
        text[before : before + K] = IMAGE
        label = torch.full_like(text, IGNORE_INDEX)
        label[before + K + after :] = text[before + K + after :]
        ids.append(text)
        labels.append(label)
    pixels = torch.randint(0, 256, (len(rows), 3, image_size, image_size), dtype=torch.uint8)
    return pixels, ids, labels


def packed(ids, labels=None, **options) -> PackedRows:
    """Rows of token ids, lists or tensors; without labels none takes a loss."""
    ids = [torch.as_tensor(row) for row in ids]
    labels = labels or [torch.full_like(row, IGNORE_INDEX) for row in ids]
    return pack(ids, labels, image_token_id=IMAGE, **options)
