"""Vision tower, perceiver resampler with an MLP, language model: logits, loss and `generate`.

Shape suffixes: B samples, T tokens, I images, K tokens an image, D width of the language model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm_composer.export.remote_code.configuration_vlm_composer import VLMComposerConfig
from vlm_composer.models.connector import Connector
from vlm_composer.models.embedding_rows import add_rows
from vlm_composer.models.own_code import check_generate_code
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler
from vlm_composer.models.vision_layers import drop_pooling, keep_layers, read_patches

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class VLMComposerForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model that was trained, for transformers.

    Args:
        config: Of the model.
        with_towers: Build the towers as well; without them the model is the connector alone.
    """

    config_class: Any = VLMComposerConfig
    _no_split_modules = ["ResamplerLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn_2 = True
    _supports_cache_class = True

    def __init__(self, config: VLMComposerConfig, *, with_towers: bool = True) -> None:
        super().__init__(config)
        config = self.config  # type: ignore[assignment]  # with the attention that transformers has chosen
        settings = dict(config.connector)
        vision_dim, mlp_ratio = config.vision_config.hidden_size, settings.pop("mlp_ratio")
        vision_ln = nn.LayerNorm(vision_dim) if settings.pop("vision_ln", False) else None
        resampler = PerceiverResampler(vision_dim, **settings)
        projector = MLPProjector(
            resampler.latent_dim, config.text_config.hidden_size, mlp_ratio=mlp_ratio
        )
        self.vision_tower: Any = None
        self.language_model: Any = None
        self.connector = Connector(resampler, projector, vision_ln)
        if with_towers:
            # Cutting changes a configuration; that of the model stays the whole tower's.
            vision_config = copy.deepcopy(config.vision_config)
            self._attach(
                AutoModel.from_config(vision_config, trust_remote_code=False),
                AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False),
            )
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        vision_tower: str | None = None,
        language_model: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the model; where the configuration names the towers, from where they are.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *model_args: As transformers'.
            vision_tower: Another place of the same vision tower than the configuration names.
            language_model: Another place of the same language model.
            **kwargs: As transformers'. `torch_dtype` is that of all three parts; `device_map` may
                be one device where the towers have weights of their own.

        Raises:
            ValueError: Weights are missing, or an option cannot be used.
        """
        config = kwargs.pop("config", None)
        if not isinstance(config, VLMComposerConfig):
            hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
            config = VLMComposerConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if config.towers is None:
            if vision_tower or language_model:
                raise ValueError("vision_tower, language_model: their weights are in the model's")
            return super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, **kwargs
            )
        device_map = kwargs.get("device_map")
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential") or (
            isinstance(device_map, Mapping) and set(device_map) != {""}
        ):
            raise ValueError(
                f"device_map {device_map!r}: the towers are loaded one by one, onto one device; "
                "save the model whole first (save_pretrained, or export --with-towers)"
            )
        if kwargs.get("quantization_config") is not None:
            raise ValueError("quantization_config: save the model whole first (save_pretrained)")
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            with_towers=False,
            output_loading_info=True,
            **kwargs,
        )
        _check_report(report, "the connector", strict=True)
        model._load_towers(vision_tower, language_model, device_map)
        return (model, report) if wants_report else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save everything, the towers too, wherever they were loaded from."""
        towers, self.config.towers = self.config.towers, None
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.towers = towers

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            input_ids: (B, T) token ids, K times `<image_patch>` for an image.
            pixel_values: (I, 3, S, S) normalised pixels, the images of sample 0 first.
            attention_mask: (B, T), 0 at padding, on either side.
            position_ids: (B, T); counted from the attention mask when None.
            past_key_values: transformers' cache.
            inputs_embeds: (B, T, D) in place of `input_ids`, image tokens in place.
            labels: (B, T), -100 where no loss is taken.
            use_cache: Return a cache.
            cache_position: (T,) of `generate`.
            logits_to_keep: As transformers'.
            **kwargs: For the language model.

        Returns:
            `loss` (with labels), `logits` (B, T, vocabulary) and `past_key_values`.

        Raises:
            ValueError: The images and the `<image_patch>` tokens do not fit each other.
        """
        begins = past_key_values is None or past_key_values.get_seq_length() == 0
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if begins:
                inputs_embeds = self._put_images(input_ids, inputs_embeds, pixel_values)
        elif pixel_values is not None:
            raise ValueError("pixel_values have no place in inputs_embeds; give input_ids")
        if position_ids is None and begins and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        options = {
            "position_ids": position_ids,
            "cache_position": cache_position,
            "past_key_values": past_key_values,
        }
        if labels is None:
            options["logits_to_keep"] = logits_to_keep
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            labels=labels,
            use_cache=use_cache,
            **self._known_to_language_model(options, kwargs),
        )

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Map normalised pixels (I, 3, S, S) to image tokens (I, K, D)."""
        tower = self.vision_tower
        side = self.config.image_size or self.config.vision_config.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: (images, 3, {side}, {side}) "
                "are expected"
            )
        return self.connector(read_patches(tower, pixel_values.to(tower.dtype)))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, pixel_values: Any = None, cache_position: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Give the images to the first step alone: afterwards they are in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, cache_position=cache_position, **kwargs
        )
        first = cache_position is None or cache_position[0] == 0
        inputs["pixel_values"] = pixel_values if first else None
        return inputs

    def get_input_embeddings(self) -> Any:
        return None if self.language_model is None else self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return None if self.language_model is None else self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> Any:
        base = self.language_model.base_model
        return self.language_model.get_decoder() if base is self.language_model else base

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the connector as its own modules draw it, and the towers as they do."""

    def _put_images(
        self, input_ids: Tensor, inputs_embeds: Tensor, pixel_values: Tensor | None
    ) -> Tensor:
        is_image_BT = input_ids == self.config.image_token_id
        num_images = 0 if pixel_values is None else pixel_values.shape[0]
        tokens_per_image = self.connector.num_image_tokens
        found = is_image_BT.sum(dim=1)
        if (found % tokens_per_image).any() or found.sum() != num_images * tokens_per_image:
            raise ValueError(
                f"the samples have {found.tolist()} <image_patch> tokens for {num_images} "
                f"image(s) of {tokens_per_image} tokens each"
            )
        if pixel_values is None:
            return inputs_embeds
        tokens_IKD = self.get_image_features(pixel_values).to(inputs_embeds)
        return inputs_embeds.masked_scatter(is_image_BT[..., None], tokens_IKD)

    def _known_to_language_model(
        self, options: dict[str, Any], more: dict[str, Any]
    ) -> dict[str, Any]:
        """Leave out what a model of transformers does not take; of `options` also what it does not
        name, for BLOOM takes anything and raises."""
        known = inspect.signature(self.language_model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
        return {key: value for key, value in options.items() if key in known} | {
            key: value for key, value in more.items() if takes_any or key in known
        }

    def _load_towers(
        self, vision_tower: str | None, language_model: str | None, device_map: Any
    ) -> None:
        """Load the towers that the configuration names, in the connector's dtype."""
        at, given = self.config.towers, (vision_tower, language_model)
        text_config = copy.deepcopy(self.config.text_config)
        text_config.vocab_size = at["language_model"]["vocab_size"]
        configs = (copy.deepcopy(self.config.vision_config), text_config)
        loaded = []
        kinds = ("vision_tower", AutoModel), ("language_model", AutoModelForCausalLM)
        for (part, auto), place, config in zip(kinds, given, configs, strict=True):
            name = place or at[part]["name"]
            check_generate_code(name)
            tower, report = auto.from_pretrained(
                name,
                config=config,
                revision=None if place else at[part]["revision"],
                torch_dtype=self.dtype,
                device_map=device_map,
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,
            )
            _check_report(report, name)
            loaded.append(tower)
        self._attach(*loaded)
        self.eval()

    def _attach(self, vision_tower: Any, language_model: Any) -> None:
        drop_pooling(vision_tower)
        keep_layers(vision_tower, self.config.vision_layer)
        add_rows(language_model, self.config.text_config.vocab_size)
        self.vision_tower, self.language_model = vision_tower, language_model


def _check_report(report: dict[str, Any], name: str, *, strict: bool = False) -> None:
    """Refuse weights that transformers would replace by random ones, with a warning only."""
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if strict:
        wrong += report["unexpected_keys"]
    if wrong:
        raise ValueError(f"{name}: {len(wrong)} weights do not fit the model: {sorted(wrong)[:3]}")
