"""An export as a model and its processor, through the installed code: nothing of the folder is run.

The public names of this file are those of `vlm_composer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from vlm_composer.config.model import Dtype
from vlm_composer.data.template import check_token_ids
from vlm_composer.export.remote_code.configuration_vlm_composer import VLMComposerConfig
from vlm_composer.export.remote_code.image_processing_vlm_composer import (
    VLMComposerImageProcessor,
)
from vlm_composer.export.remote_code.modeling_vlm_composer import (
    VLMComposerForConditionalGeneration,
)
from vlm_composer.export.remote_code.processing_vlm_composer import VLMComposerProcessor
from vlm_composer.models.own_code import check_export_code, load_tokenizer
from vlm_composer.training.hardware import choose_device, storage_dtype

Device = Literal["auto", "cpu", "gpu"]


def load_export(
    folder: str | Path,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    vision_tower: str | None = None,
    language_model: str | None = None,
) -> tuple[VLMComposerForConditionalGeneration, VLMComposerProcessor]:
    """Load what `python -m vlm_composer.export` wrote, or transformers saved of it.

    Args:
        folder: The export.
        device: "cpu", "gpu", or "auto" for the GPU where there is one.
        dtype: Of the weights: "bf16", "fp32", or "auto" for the one that the export names, and fp32
            where that is bf16 and the device does not multiply it in hardware.
        vision_tower: Another place of the vision tower than the export names.
        language_model: Another place of the language model.

    Returns:
        The model, ready for `generate`, and its processor.

    Raises:
        ValueError: The folder is no export, or its weights do not fit, or there is no GPU.
        OSError: The folder or a tower cannot be read.
    """
    if not Path(folder, "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not an export: it has no config.json")
    check_export_code(folder)
    config = VLMComposerConfig.from_pretrained(folder)
    chosen = choose_device(None if device == "auto" else device)
    # What it was trained in, unless that would take ten times as long here.
    slow = storage_dtype("auto", chosen)
    trained = config.torch_dtype or torch.float32
    torch_dtype = (
        storage_dtype(dtype, chosen) if dtype != "auto" else torch.promote_types(trained, slow)
    )
    model = VLMComposerForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        torch_dtype=torch_dtype,
        vision_tower=vision_tower,
        language_model=language_model,
    )
    processor = load_processor(folder)
    check_token_ids(
        processor.tokenizer,
        model.get_input_embeddings().weight.shape[0],
        name=str(folder),
        language_model=language_model or str(folder),
    )
    return model.to("cuda" if chosen == "gpu" else "cpu").eval(), processor


def load_processor(folder: str | Path) -> VLMComposerProcessor:
    """Load the processor of an export alone."""
    settings, _ = VLMComposerProcessor.get_processor_dict(folder)
    keys = ("num_image_tokens", "add_bos", "max_seq_len", "default_prompt")
    return VLMComposerProcessor(
        VLMComposerImageProcessor.from_pretrained(folder),
        load_tokenizer(folder),
        **{key: settings[key] for key in keys if key in settings},
    )


def caption_images(
    model: VLMComposerForConditionalGeneration,
    processor: VLMComposerProcessor,
    images: Sequence[Image.Image | str],
    prompt: str | Sequence[str] | None = None,
    *,
    max_new_tokens: int = 64,
    **generation: Any,
) -> list[str]:
    r"""Caption a batch of images.

    Args:
        model: As `load_export` returns it.
        processor: Of the same export.
        images: B PIL images or paths.
        prompt: One for all, or B; `"\n<image>"` is appended where it is missing. None asks the
            export's default prompt.
        max_new_tokens: Longest caption in tokens.
        **generation: As transformers' `generate`, which is greedy by default.

    Returns:
        B captions.

    Raises:
        ValueError: There are not as many prompts as images, or something is no image.
        OSError: A file cannot be read.
    """
    batch = processor(list(images), prompt).to(model.device)
    generated: Any = model.generate(**batch, max_new_tokens=max_new_tokens, **generation)
    return processor.captions_of(generated, batch)
