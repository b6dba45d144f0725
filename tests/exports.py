"""Short runs of real tiny towers, and what is exported of them, once a session."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from runs import run
from shared_memory import released_shared_memory
from tiny import save_tower, tiny_dinov2, tiny_llama, tiny_qwen3, tiny_siglip
from vlm_composer.assembly import assemble_template, vision_settings
from vlm_composer.config import TrainConfig
from vlm_composer.data.images import decode_image
from vlm_composer.data.template import Template
from vlm_composer.export.exporting import export_checkpoint
from vlm_composer.models.packing import pack
from vlm_composer.models.vlm import AnswerLogits, VisionLanguageModel

PROMPTS = ["<image>\nColour?", "What colour is it?\n<image>", "Look: <image> And now?"]
ANSWERS = ["red", "a picture of something", ""]


@dataclass
class Exported:
    """A trained model and its export."""

    config: TrainConfig
    vlm: VisionLanguageModel
    template: Template
    folder: Path
    pictures: list[Path]

    @property
    def checkpoints(self) -> str:
        return self.config.folder("{run_folder}/checkpoints")

    def pixels(self) -> torch.Tensor:
        """The pictures as the training reads them."""
        vision = vision_settings(self.config)
        return torch.stack(
            [
                decode_image(path.read_bytes(), vision.image_size, vision.resample, "pil")
                for path in self.pictures
            ]
        )

    @torch.no_grad()
    def answer_logits(self) -> AnswerLogits:
        """What the trainer's model says of the answers' tokens."""
        samples = [self.template.encode(*pair) for pair in zip(PROMPTS, ANSWERS, strict=True)]
        rows = pack(
            [torch.tensor(sample.input_ids) for sample in samples],
            [torch.tensor(sample.labels) for sample in samples],
            image_token_id=self.vlm.image_token_id,
        )
        logits = self.vlm.eval()(self.pixels(), rows, return_logits=True)
        assert isinstance(logits, AnswerLogits)
        return logits


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave no trace in the process, as the fixtures of a single test see to."""
    logger = logging.getLogger("vlm_composer")
    before = (list(logger.handlers), logger.propagate, logger.level)
    with released_shared_memory():
        yield
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
    torch.use_deterministic_algorithms(False)


def train_and_export(
    folder: Path,
    shards: Path,
    vision: Callable[[], Any],
    language: Callable[[], Any],
    **changes: Any,
) -> Exported:
    """Draw towers, train for four steps and export; the towers are saved beside the run."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "run_name": "tiny",
        "run_folder": str(folder / "run"),
        "vision_tower": {
            "name": str(save_tower(vision(), folder / "vision")),
            "dtype": "fp32",
            "layer": -2,
        },
        "language_model": {
            "name": str(save_tower(language(), folder / "language")),
            "dtype": "fp32",
        },
        "connector": {
            "vision_ln": True,
            "resampler": {"num_latents": 4, "depth": 2, "num_heads": 2, "head_dim": 16},
            "projector": {"mlp_ratio": 2},
        },
        "max_seq_len": 64,
        "image_decoder": "pil",
        "train_loader": {
            "dataset": {"local": str(shards / "train"), "shuffle": True},
            "num_workers": 0,
        },
        "eval_loader": {"dataset": {"local": str(shards / "eval")}, "num_workers": 0},
        "global_train_batch_size": 8,
        "device_train_microbatch_size": 8,
        "max_duration": "4ba",
        "eval_interval": "4ba",
        "save_folder": "{run_folder}/checkpoints",
        "save_interval": "2ba",
        "device": "cpu",
        "precision": "fp32",
        "optimizer": {"lr": 1e-2},
        "scheduler": {"t_warmup": "1ba"},
        "loggers": {"jsonl": {}},
        "progress_bar": False,
        "log_to_console": False,
        "compile_blocks": False,
    } | changes
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    config = TrainConfig.read(path)
    with _undisturbed():
        _, vlm, _ = run(config)
    pictures = []
    for index, colour in enumerate([(230, 30, 30), (30, 200, 30), (250, 250, 250)]):
        pictures.append(folder / f"picture{index}.png")
        Image.new("RGB", (31, 17 + index), colour).save(pictures[-1])
    out = export_checkpoint(config.folder("{run_folder}/checkpoints"), folder / "export")
    return Exported(config, vlm, assemble_template(config), out, pictures)


@pytest.fixture(scope="session")
def qwen_export(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Exported:
    """Qwen3 and SigLIP."""
    return train_and_export(tmp_path_factory.mktemp("qwen"), shards, tiny_siglip, tiny_qwen3)


@pytest.fixture(scope="session")
def llama_export(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Exported:
    """Llama, whose table is its head and has no spare row, and DINOv2; samples have a start
    token."""
    llama = partial(tiny_llama, vocab_size=258)
    return train_and_export(
        tmp_path_factory.mktemp("llama"), shards, tiny_dinov2, llama, add_bos=True
    )


def png(colour: tuple[int, int, int]) -> bytes:
    """A small picture."""
    data = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(data, "PNG")
    return data.getvalue()


def read_card(folder: Path) -> str:
    """The text of an export's card as a reader of Markdown shows it."""
    card = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    tokens = MarkdownIt().enable("table").parse(card)
    return "\n".join("".join(c.content for c in token.children or ()) for token in tokens)
