"""Hugging Face towers by hub id or folder: their configurations, weights or random weights.

Everything works under `torch.device("meta")` as well.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import no_init_weights

from vlm_composer.models.own_code import check_config_code, check_model_code

BUNDLED_CONFIGS = Path(__file__).parent / "tower_configs"
"""Configurations that ship with the project, by hub id with `/` written as `--`."""

EXAMPLES = {
    AutoModel: "a vision transformer that keeps its patches, such as SigLIP, CLIP, ViT or DINOv2",
    AutoModelForCausalLM: "a decoder-only language model, such as Qwen3, Llama or Gemma 3",
}
"""What to use in place of a model that cannot be a tower."""


def bundled_or_given(name: str) -> str:
    """Return the folder of the bundled configuration of hub id `name`, or `name` itself."""
    folder = BUNDLED_CONFIGS / name.replace("/", "--")
    return str(folder) if folder.is_dir() and not Path(name).is_dir() else name


def read_config(
    name: str,
    half: Literal["vision_config", "text_config"],
    *,
    revision: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> PretrainedConfig:
    """Read a tower's configuration, from the bundled ones where there is one.

    Args:
        name: Hub id or folder.
        half: Which half of a model of images and text (SigLIP, CLIP, Gemma 3, LLaVA) to take.
        revision: Branch, tag or commit on the hub; a bundled configuration is then not used.
        overrides: Attributes to change, for example `{"num_hidden_layers": 2}`.

    Returns:
        The configuration.

    Raises:
        ValueError: An override names an attribute that the configuration does not have; or the
            model needs code of its own.
    """
    source = name if revision else bundled_or_given(name)
    check_model_code(name, source, revision)
    check_config_code(name, overrides)
    config = AutoConfig.from_pretrained(
        source, revision=revision or "main", trust_remote_code=False
    )
    config = getattr(config, half, config)
    for key, value in (overrides or {}).items():
        if not hasattr(config, key):
            raise ValueError(
                f"config_overrides.{key}: the configuration of {name} has no such attribute; it "
                f"has {', '.join(sorted(config.to_dict()))}"
            )
        setattr(config, key, value)
    return config


def load_vision_model(
    name: str,
    *,
    pretrained: bool,
    dtype: torch.dtype,
    revision: str | None = None,
    overrides: dict[str, Any] | None = None,
    empty: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a vision model.

    Args:
        name: Hub id or folder.
        pretrained: Read the weights; otherwise they are random, from the global generator.
        dtype: Storage of the weights.
        revision: Branch, tag or commit on the hub.
        overrides: Attributes of the configuration to change (`pretrained=False` only).
        empty: Read and draw nothing; the weights are on the meta device, and all else is as ever.
        attn_implementation: transformers' name of the attention function; None takes sdpa where
            the model has it, else eager.

    Returns:
        The Hugging Face model.

    Raises:
        ValueError: The checkpoint lacks weights of the model.
    """
    config = read_config(name, "vision_config", revision=revision, overrides=overrides)
    options = {"torch_dtype": dtype, "attn_implementation": attn_implementation}
    return _load(AutoModel, name, config, pretrained, revision, empty, options)


def load_language_model(
    name: str,
    *,
    pretrained: bool,
    dtype: torch.dtype,
    revision: str | None = None,
    overrides: dict[str, Any] | None = None,
    empty: bool = False,
) -> PreTrainedModel:
    """Load a causal language model; arguments and errors as for `load_vision_model`.

    `LanguageModel` replaces its attention where it can, else it is torch's own.
    """
    config = read_config(name, "text_config", revision=revision, overrides=overrides)
    options = {"torch_dtype": dtype}
    return _load(AutoModelForCausalLM, name, config, pretrained, revision, empty, options)


def check_kind(auto: Any, name: str, config: PretrainedConfig) -> None:
    """Raise ValueError where transformers' `auto` class has no model for a configuration."""
    if type(config) not in auto._model_mapping:
        kind = "causal language model" if auto is AutoModelForCausalLM else "vision model"
        raise ValueError(
            f"{name} is a {config.model_type or type(config).__name__}, which transformers has no "
            f"{kind} for; use {EXAMPLES[auto]}"
        )


def _load(
    auto: Any,
    name: str,
    config: PretrainedConfig,
    pretrained: bool,
    revision: str | None,
    empty: bool,
    options: dict[str, Any],
) -> PreTrainedModel:
    check_kind(auto, name, config)
    if empty:
        return build_empty(auto, config, **options)
    if not pretrained:
        return auto.from_config(copy.deepcopy(config), trust_remote_code=False, **options)
    model, report = auto.from_pretrained(
        name,
        config=config,
        revision=revision or "main",
        output_loading_info=True,
        trust_remote_code=False,
        weights_only=True,
        **options,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, "
            f"the first is {missing[0]}; a frozen tower with random parts cannot be trained against"
        )
    return model


def build_empty(auto: Any, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Build a model of transformers' `auto` class with its parameters on the meta device."""
    with _parameters_on_meta(), no_init_weights():  # which may write to weights that it lacks
        model = auto.from_config(copy.deepcopy(config), trust_remote_code=False, **options)
    model.tie_weights()
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put every parameter that a module registers on the meta device.

    Buffers and plain tensors, such as the frequencies of a rotary embedding, get their values,
    which they would not under `torch.device("meta")`.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
