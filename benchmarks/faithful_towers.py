"""Towers, pairs and the yaml that `throughput.py` trains with: stage 1, smaller by the same factor.

Weights are random, yet drawn so that every layer changes what passes through it; a model at its
initialisation is nearly linear, and gradients through it would agree whatever one computed.
"""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests' byte tokenizer

from convert import convert_llava  # noqa: E402
from tiny import save_tower  # noqa: E402
from vlm_composer.config import TrainConfig  # noqa: E402
from vlm_composer.config.model import Dtype  # noqa: E402
from vlm_composer.models.connector import Connector  # noqa: E402
from vlm_composer.models.projector import MLPProjector  # noqa: E402
from vlm_composer.models.resampler import PerceiverResampler  # noqa: E402
from vlm_composer.training.hardware import has_native_bf16  # noqa: E402

DTYPE: Dtype = "bf16" if has_native_bf16("cpu") else "fp32"
"""What trainings are timed in: bf16, as stage 1, or fp32 where the machine has no bf16."""
TORCH_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}[DTYPE]

LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0
MAX_SEQ_LEN = 256
PROMPT_TOKENS = (5, 15)
"""Fewest and most tokens of a prompt without its image; LLaVA-Pretrain has about a dozen."""
NUM_PROMPTS = 11
ANSWER_TOKENS = (10, 22, 60)
"""Fewest, median and most tokens of an answer with its end-of-text, log-normal in between."""


@dataclass(frozen=True)
class Shape:
    """Sizes of both towers and of the connector between them."""

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    intermediate_size: int = 3072
    vocab_size: int = 16_384
    vision_hidden_size: int = 432
    vision_num_hidden_layers: int = 12
    vision_num_attention_heads: int = 6
    vision_intermediate_size: int = 1616
    image_size: int = 224
    num_latents: int = 64
    resampler_heads: int = 2
    """Of width 64, so that the resampler is 128 wide."""
    mlp_ratio: int = 4


FAITHFUL = Shape()
"""Qwen3-8B, SigLIP so400m and their 82 M connector at a quarter of the width and a third of the
depth."""
LARGE_VOCABULARY = replace(FAITHFUL, vocab_size=151_936)
"""With Qwen3's own vocabulary: what its logits cost in memory."""
TINY = Shape(
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    intermediate_size=256,
    vocab_size=512,
    vision_hidden_size=96,
    vision_num_hidden_layers=2,
    vision_num_attention_heads=2,
    vision_intermediate_size=192,
    image_size=56,
    num_latents=8,
    resampler_heads=1,
    mlp_ratio=2,
)
"""For a run that only shows that everything works."""
TINY_384 = replace(TINY, image_size=384)
"""For the loader, which does not care for weights: images as large as stage 1 wants them."""


def write_towers(shape: Shape, folder: Path) -> None:
    """Save both towers in bf16 as `siglip` and `qwen3`, and the connector as `connector.pt`.

    Every contender and the fp32 reference start from these bf16 weights.
    """
    torch.manual_seed(1)
    vision = SiglipVisionConfig(
        hidden_size=shape.vision_hidden_size,
        intermediate_size=shape.vision_intermediate_size,
        num_hidden_layers=shape.vision_num_hidden_layers,
        num_attention_heads=shape.vision_num_attention_heads,
        image_size=shape.image_size,
        patch_size=14,
    )
    text = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=False,
        rope_theta=1e6,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=257,
    )
    for name, kind, config in (
        ("siglip", SiglipVisionModel, vision),
        ("qwen3", Qwen3ForCausalLM, text),
    ):
        with torch.device("meta"):  # transformers' own initialisation would be thrown away
            model = kind(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        _draw_weights(model)
        save_tower(model, folder / name)
    torch.save(build_connector(shape).state_dict(), folder / "connector.pt")


def _draw_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "embed_tokens" in name:
                parameter.normal_()
            elif parameter.ndim >= 2:
                parameter.normal_(std=0.7 / math.sqrt(parameter[0].numel()))
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)
            else:  # the scale of a norm
                parameter.normal_(mean=1, std=0.1)


def build_connector(shape: Shape) -> Connector:
    """The connector that `training_yaml` asks the product for."""
    resampler = PerceiverResampler(
        shape.vision_hidden_size,
        num_latents=shape.num_latents,
        depth=2,
        num_heads=shape.resampler_heads,
        head_dim=64,
    )
    projector = MLPProjector(resampler.latent_dim, shape.hidden_size, mlp_ratio=shape.mlp_ratio)
    return Connector(resampler, projector)


def write_pairs(folder: Path, count: int) -> None:
    """Write a LLaVA JSON, `count` JPEGs with the look of photos, and MDS shards of both.

    A token of the byte tokenizer is a character, so that texts are as long as they are meant.
    """
    draw, pixels = random.Random(7), np.random.default_rng(7)
    images = folder / "images"
    images.mkdir()
    prompts = [_prompt(draw) for _ in range(NUM_PROMPTS)]
    items = []
    for index in range(count):
        _photo(pixels).save(images / f"{index}.jpg", quality=90)
        fewest, median, most = ANSWER_TOKENS
        length = round(math.exp(draw.gauss(math.log(median), 0.45)))
        answer = _text(draw, min(max(length, fewest), most) - 1)  # the end-of-text is one more
        turns = (("human", draw.choice(prompts)), ("gpt", answer))
        items.append(
            {
                "id": str(index),
                "image": f"{index}.jpg",
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
    (folder / "pairs.json").write_text(json.dumps(items))
    convert_llava(folder / "pairs.json", images, folder / "mds", eval_ratio=0, show_progress=False)


def _prompt(draw: random.Random) -> str:
    # Two newlines are tokens as well: the one beside the image, and the template's at the end.
    text = _text(draw, draw.randint(*PROMPT_TOKENS) - 2)
    return draw.choice((f"<image>\n{text}", f"{text}\n<image>"))


def _text(draw: random.Random, length: int) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length))


def _photo(pixels: np.random.Generator) -> Image.Image:
    """Smooth shapes, texture and grain: 336 to 512 pixels a side and about 50 kB."""
    size = tuple(int(side) for side in pixels.integers(336, 512, 2))
    picture = np.zeros((size[1], size[0], 3), np.float32)
    for cells, weight in ((4, 0.6), (24, 0.3)):
        coarse = pixels.integers(0, 256, (cells, cells, 3), np.uint8)
        picture += weight * np.asarray(Image.fromarray(coarse).resize(size), np.float32)
    picture += pixels.normal(12, 6, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def training_yaml(
    shape: Shape,
    towers: Path,
    data: Path,
    out: Path,
    microbatch_size: int,
    *,
    dtype: Dtype = DTYPE,
    **changes: Any,
) -> Path:
    """Write the yaml of a run as a user would, one micro-batch a step.

    Args:
        shape: Of the towers.
        towers: Folder of `write_towers`.
        data: Folder of `write_pairs`.
        out: The file; the run's own folder is beside it.
        microbatch_size: Samples of a step.
        dtype: Of the towers' weights and of the arithmetic.
        changes: Keys to replace.

    Returns:
        `out`.
    """
    settings = {
        "run_name": "throughput",
        "run_folder": str(out.with_suffix("")),
        "vision_tower": {
            "name": str(towers / "siglip"),
            "dtype": dtype,
            # Hugging Face's `hidden_states[-1]`, which Llava takes: before the final norm.
            "layer": shape.vision_num_hidden_layers,
        },
        "language_model": {"name": str(towers / "qwen3"), "dtype": dtype},
        "precision": "fp32" if dtype == "fp32" else "amp_bf16",
        "cache_prompts": True,  # as the recipes have it for LLaVA-Pretrain
        "connector": {
            "resampler": {
                "num_latents": shape.num_latents,
                "num_heads": shape.resampler_heads,
                "head_dim": 64,
            },
            "projector": {"mlp_ratio": shape.mlp_ratio},
        },
        "max_seq_len": MAX_SEQ_LEN,
        # Decoding in the process that trains, as on the other side: its time counts for both.
        "train_loader": {"dataset": {"local": str(data / "mds" / "train")}, "num_workers": 0},
        "global_train_batch_size": microbatch_size,
        "device_train_microbatch_size": microbatch_size,
        "max_duration": "100000ba",  # it is stopped from outside
        "device": "cpu",
        "optimizer": {"lr": LEARNING_RATE},
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
        "algorithms": {"gradient_clipping": {"clipping_threshold": MAX_GRAD_NORM}},
        "progress_bar": False,
    }
    out.write_text(yaml.safe_dump({**settings, **changes}))
    return out


def read_yaml(path: Path) -> TrainConfig:
    """Read what `training_yaml` wrote, as `train.py` does."""
    return TrainConfig.read(path)
