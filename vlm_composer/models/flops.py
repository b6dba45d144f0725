"""Floating-point operations of a training step, counted from the modules.

Matrix multiplications only: linear layers, the patch convolution and the two products of attention
(over the full square, as PaLM's MFU counts them). A multiplication and its addition are two
operations.

The count is that of the model as it is written, every layer at every token. What the code does not
compute, the last layer's feed-forward where no answer is predicted and cached prompts, counts as
speed.

A frozen language model costs a forward and the gradient of its input, 4 operations a parameter and
token, never the gradient of its weights; a frozen vision tower costs its forward alone, 2; the
connector costs 6, but for its first linear, whose input needs no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from vlm_composer.models.vlm import VisionLanguageModel


def _matmul_weights(module: nn.Module) -> int:
    """Weights of `module` that take part in one multiplication a row."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of one training step, by part."""

    vision_tower: float
    connector: float
    decoder: float
    head: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.vision_tower + self.connector + self.decoder + self.head


def training_flops(
    model: VisionLanguageModel, text_lengths: Iterable[int], num_answer_tokens: int
) -> TrainingFlops:
    """Count the operations of a forward and backward pass.

    Args:
        model: On any device, meta included.
        text_lengths: Tokens of each sample, image tokens included, padding not. One image a sample.
        num_answer_tokens: Tokens that take a loss, in all samples together.

    Returns:
        Operations for all the samples.
    """
    lengths = list(text_lengths)
    return TrainingFlops(
        vision_tower=len(lengths) * _vision_forward(model),
        connector=len(lengths) * _connector_forward_and_backward(model),
        decoder=_decoder_forward_and_backward(model, lengths),
        head=4.0
        * num_answer_tokens
        * model.language_model.model.get_output_embeddings().weight.numel(),
    )


def _vision_forward(model: VisionLanguageModel) -> float:
    tower = model.vision_tower
    config = tower.model.config
    # A class token and register tokens run through the layers with the patches.
    num_prefix = 1 if config.model_type in ("clip_vision_model", "vit") else 0
    if config.model_type.startswith("dinov2"):
        num_prefix = 1 + getattr(config, "num_register_tokens", 0)
    rows = tower.num_patches + num_prefix
    patch_weights = sum(m.weight.numel() for m in tower.modules() if isinstance(m, nn.Conv2d))
    attention = config.num_hidden_layers * 4 * rows**2 * tower.hidden_size
    return 2 * _matmul_weights(tower) * rows + 2 * patch_weights * tower.num_patches + attention


def _connector_forward_and_backward(model: VisionLanguageModel) -> float:
    resampler, projector = model.connector.resampler, model.connector.projector
    patches, latents = model.vision_tower.num_patches, model.connector.num_image_tokens
    width = resampler.latent_dim
    input_needs_gradient = model.connector.vision_ln is not None
    flops = (6 if input_needs_gradient else 4) * resampler.proj_in.weight.numel() * patches
    for layer in resampler.layers:
        key_and_value, query_and_out = 2 * width**2, 2 * width**2
        flops += 6 * key_and_value * patches + 6 * query_and_out * latents
        flops += 6 * _matmul_weights(layer.ff) * latents
        flops += 12 * patches * latents * width  # scores and mix: 2 products forward, 4 backward
    return float(flops + 6 * _matmul_weights(projector) * latents)


def _decoder_forward_and_backward(model: VisionLanguageModel, lengths: list[int]) -> float:
    config = model.language_model.model.config
    weights = _matmul_weights(model.language_model.decoder)
    heads = getattr(config, "num_attention_heads", None)  # Mamba has none
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // (heads or 1)
    attention_width = (heads or 0) * head_dim
    attention = 12 * config.num_hidden_layers * attention_width * sum(t**2 for t in lengths)
    return float(4 * weights * sum(lengths) + attention)
