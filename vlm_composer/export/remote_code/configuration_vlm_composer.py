"""Configuration of a vision tower, a perceiver resampler with an MLP, and a language model."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


class VLMComposerConfig(PretrainedConfig):
    """Configuration of `VLMComposerForConditionalGeneration`.

    Args:
        vision_config: Of the whole vision tower, before layers are cut off.
        text_config: Of the language model. Its `vocab_size` counts the row of `<image_patch>`.
        connector: `num_latents`, `depth`, `num_heads`, `head_dim`, `mlp_ratio`, `vision_ln`.
        vision_layer: Whose output the connector reads: -1 the last hidden state after the final
            norm, others as in LLaVA's `vision_feature_layer`.
        image_size: Side of the square image in pixels; None is the tower's own.
        image_token_id: Id of `<image_patch>`.
        towers: Where `vision_tower` and `language_model` are loaded from: `name` (hub id or
            folder), `revision`, and the language model's own `vocab_size`. None: their weights
            are in this model's files.
        **kwargs: transformers' own.
    """

    model_type = "vlm_composer"
    sub_configs: Any = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        *,
        connector: dict[str, Any] | None = None,
        vision_layer: int = -1,
        image_size: int | None = None,
        image_token_id: int | None = None,
        towers: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _read(vision_config, "siglip_vision_model")
        self.text_config = _read(text_config, "qwen3")
        self.connector = connector or {}
        self.vision_layer = vision_layer
        self.image_size = image_size
        self.image_token_id = image_token_id
        self.towers = towers
        kwargs["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        super().__init__(**kwargs)


def _read(config: PretrainedConfig | dict[str, Any] | None, default: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    entries = dict(config or {})
    return CONFIG_MAPPING[entries.get("model_type", default)](**entries)
