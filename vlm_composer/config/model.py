"""The sections of a training yaml about the model: towers and connector."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from vlm_composer.config.section import Name, Section, at_least

Dtype = Literal["bf16", "fp32", "auto"]


@dataclass
class TowerConfig(Section):
    """What both towers have in common."""

    name: str
    """Hub id or folder of a Hugging Face model."""
    pretrained: bool = True
    """Read its weights; false builds random ones from its configuration."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the main branch when empty."""
    dtype: Dtype = "bf16"
    """Storage of the frozen weights. auto: bf16 where the device multiplies it in hardware, else
    fp32."""
    config_overrides: dict[Name, Any] = field(default_factory=dict)
    """Attributes of its configuration to change; only with `pretrained: false`."""


@dataclass
class VisionTowerConfig(TowerConfig):
    """The frozen vision tower."""

    layer: int = -1
    """Whose output to use: -1 the last hidden state after the final norm; others as in LLaVA's
    `vision_feature_layer`, before that norm; layers above it are removed."""
    attn_implementation: str | None = None
    """transformers' name of the attention function; sdpa where the model has it, else eager, when
    empty."""
    fuse_gelu: bool | Literal["auto"] = "auto"
    """Let oneDNN compute a linear layer and its GELU in one, with a copy of the layer's weights.
    Only on a CPU, where auto does so, for bf16 only with AVX512 or AVX-NE-CONVERT; not with
    `parallelism: shard`."""
    image_size: int | None = None
    """Side of the square image in pixels; the model's own when empty."""


@dataclass
class LanguageModelConfig(TowerConfig):
    """The frozen language model."""

    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; the model's own when empty. Only `<image_patch>` may have
    an id beyond the model's table."""


@dataclass
class ResamplerConfig(Section):
    """Perceiver resampler: patches to a fixed number of tokens."""

    num_latents: Annotated[int, at_least(1)] = 64
    """Tokens an image becomes."""
    depth: Annotated[int, at_least(1)] = 2
    """Number of layers."""
    num_heads: Annotated[int, at_least(1)] = 8
    """Attention heads a layer."""
    head_dim: Annotated[int, at_least(1)] = 64
    """Width of a head; the latents are `num_heads * head_dim` wide."""


@dataclass
class ProjectorConfig(Section):
    """MLP projector: from the latents to the language model."""

    mlp_ratio: Annotated[int, at_least(1)] = 4
    """Hidden width as a multiple of the language model's width."""


@dataclass
class ConnectorConfig(Section):
    """The trainable part."""

    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    """From patches to a fixed number of tokens."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """From the latents to the language model's width."""
    vision_ln: bool = False
    """A trainable LayerNorm on the vision tower's output."""
