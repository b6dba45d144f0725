"""From the configuration to the model and its template; `loaders` is for the data.

These two know both the yaml and the classes; `train.py`, `plan.py` and the demo build with them.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Resampling
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import cached_file

from vlm_composer.config import TrainConfig
from vlm_composer.config.model import TowerConfig, VisionTowerConfig
from vlm_composer.data.features import VisionSettings
from vlm_composer.data.images import TORCH_FILTERS, preprocessor_settings
from vlm_composer.data.template import Template
from vlm_composer.models.connector import Connector
from vlm_composer.models.fused_gelu import fuse_gelu
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.own_code import load_tokenizer
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler
from vlm_composer.models.self_check import check_levers
from vlm_composer.models.tower_check import check_language_model, check_vision_model
from vlm_composer.models.tower_loading import (
    bundled_or_given,
    load_language_model,
    load_vision_model,
    read_config,
)
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.training.hardware import compile_obstacle, fusing_obstacle, storage_dtype

log = logging.getLogger(__name__)


def assemble_template(config: TrainConfig) -> Template:
    """Load the tokenizer and make the template.

    Raises:
        OSError: The tokenizer is neither a folder nor on a hub that can be reached.
        ValueError: It lacks a token that the template needs.
    """
    name = config.language_model.tokenizer or config.language_model.name
    # Threads beside each of a node's many workers, for texts of a line, cost more than they give;
    # and tokenizers warns in every worker where its parent used them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = load_tokenizer(name, config.language_model.revision)
    except KeyError as error:  # transformers knows no tokenizer for a model of that type
        raise ValueError(f"{name} has no tokenizer; set language_model.tokenizer") from error
    return Template(
        tokenizer,
        num_image_tokens=config.connector.resampler.num_latents,
        max_seq_len=config.max_seq_len,
        add_bos=config.add_bos,
    )


def assemble_model(
    config: TrainConfig,
    device: str,
    image_token_id: int | None = None,
    *,
    empty_towers: bool = False,
) -> VisionLanguageModel:
    """Build the towers and the connector.

    Random parts are drawn from torch's global generator, the connector last; on the meta device
    nothing is read or drawn.

    Args:
        config: The run.
        device: "cpu" or "gpu", for the choice of dtypes; the model is built on torch's default
            device.
        image_token_id: Id of `<image_patch>`; None takes the last row of the table, for models that
            only plan.
        empty_towers: Read no weight of the towers; they are on the meta device, for ranks that
            get them from another, with what that has found for `LanguageModel.install`.

    Returns:
        The model, towers frozen.

    Raises:
        ValueError: The towers cannot be used, or the device cannot do what the yaml insists on.
    """
    vision_tower = assemble_vision_tower(config, device, empty=empty_towers)
    check_language_model(config.language_model.name, language_config(config))
    llm = load_language_model(**_tower_options(config.language_model, device), empty=empty_towers)
    language_model = LanguageModel(llm, install=False)
    if not empty_towers:
        compiles = _compiles(config, device)
        language_model.install(check_levers(llm, compile_blocks=compiles))
    if image_token_id is None:
        image_token_id = language_model.vocab_size - 1
    if language_model.ensure_rows(image_token_id + 1):
        log.info(
            "The embedding table had no spare row for <image_patch>: resized to %d rows, frozen.",
            language_model.vocab_size,
        )
    connector = assemble_connector(config, vision_tower.hidden_size, language_model.hidden_size)
    return VisionLanguageModel(vision_tower, connector, language_model, image_token_id)


def assemble_vision_tower(config: TrainConfig, device: str, *, empty: bool = False) -> VisionTower:
    """Build the vision tower alone; arguments as for `assemble_model`."""
    settings = vision_settings(config)
    tower = VisionTower(
        load_vision_model(
            **_tower_options(config.vision_tower, device),
            empty=empty,
            attn_implementation=config.vision_tower.attn_implementation,
        ),
        layer=config.vision_tower.layer,
        image_size=config.vision_tower.image_size,
        image_mean=settings.image_mean,
        image_std=settings.image_std,
    )
    fuses = config.vision_tower.fuse_gelu
    if refusal := fusing_refusal(config, device):
        raise ValueError("; ".join(refusal))
    if fuses == "auto":
        obstacle = fusing_obstacle(device, storage_dtype(config.vision_tower.dtype, device))
        fuses = obstacle is None and config.parallelism == "replicate"
    if fuses:
        log.info("Linear layers with GELU in one: %d.", fuse_gelu(tower.model))
    return tower


def vision_config(config: TrainConfig) -> PretrainedConfig:
    """Read the vision tower's own configuration."""
    return _read_config(config.vision_tower, "vision_config")


def language_config(config: TrainConfig) -> PretrainedConfig:
    """Read the language model's own configuration."""
    return _read_config(config.language_model, "text_config")


def _read_config(tower: TowerConfig, half: Literal["vision_config", "text_config"]) -> Any:
    return read_config(tower.name, half, revision=tower.revision, overrides=tower.config_overrides)


def check_vision_architecture(config: TrainConfig) -> None:
    """Refuse a vision tower that cannot be one; no weight is read.

    Raises:
        ValueError: As `check_vision_model`.
    """
    tower = config.vision_tower
    check_vision_model(
        tower.name,
        vision_config(config),
        layer=tower.layer,
        image_size=tower.image_size,
        attn_implementation=tower.attn_implementation,
    )


def _compiles(config: TrainConfig, device: str) -> bool:
    if refusal := compile_refusal(config, device):
        raise ValueError("; ".join(refusal))
    if config.compile_blocks is False:
        return False
    obstacle = compile_obstacle(device)
    if obstacle is not None:
        log.info("Blocks are not compiled: %s.", obstacle)
    return obstacle is None


def compile_refusal(config: TrainConfig, device: str) -> tuple[str, str] | None:
    """Return what keeps `compile_blocks: true` from being done, and what to do; None if nothing."""
    obstacle = compile_obstacle(device) if config.compile_blocks is True else None
    if obstacle is None:
        return None
    return f"compile_blocks: true, but {obstacle}", "install it, or set compile_blocks: auto"


def fusing_refusal(config: TrainConfig, device: str) -> tuple[str, str] | None:
    """Return what keeps `fuse_gelu: true` from being done, and what to do; None if nothing."""
    obstacle = fusing_obstacle(device, storage_dtype(config.vision_tower.dtype, device))
    if config.vision_tower.fuse_gelu is not True or obstacle is None:
        return None
    return f"vision_tower.fuse_gelu: true, but {obstacle}", "set it to auto"


def unloaded(config: TrainConfig) -> TrainConfig:
    """Copy a configuration for a model on the meta device: no weight is read, nothing compiled."""
    config = copy.deepcopy(config)
    for tower in (config.vision_tower, config.language_model):
        tower.pretrained = False
    config.compile_blocks = config.vision_tower.fuse_gelu = False
    return config


def assemble_connector(config: TrainConfig, vision_dim: int, llm_dim: int) -> Connector:
    """Build the connector between towers of these widths."""
    resampler = PerceiverResampler(vision_dim, **asdict(config.connector.resampler))
    projector = MLPProjector(resampler.latent_dim, llm_dim, **asdict(config.connector.projector))
    vision_ln = nn.LayerNorm(vision_dim) if config.connector.vision_ln else None
    return Connector(resampler, projector, vision_ln)


def _tower_options(tower: TowerConfig, device: str) -> dict[str, Any]:
    return {
        "name": tower.name,
        "pretrained": tower.pretrained,
        "dtype": storage_dtype(tower.dtype, device),
        "revision": tower.revision,
        "overrides": tower.config_overrides,
    }


def vision_warnings(config: TrainConfig) -> list[tuple[str, str]]:
    """Return what is assumed of how the vision tower sees an image, each with what to do."""
    tower, found = config.vision_tower, []
    preprocessor = _preprocessor(tower)
    if preprocessor is None:
        found.append(
            (
                f"{tower.name} has no preprocessor_config.json: mean and std 0.5, bicubic",
                "see that it was trained so, or put its preprocessor_config.json there",
            )
        )
    resample = preprocessor_settings(preprocessor or {})[2]
    if config.image_decoder == "torchvision" and resample not in TORCH_FILTERS:
        found.append(
            (
                f"{tower.name} scales its images with {Resampling(resample).name}, which torch "
                "does not have: PIL decodes and scales",
                "set image_decoder: pil, which is the same",
            )
        )
    return found


def _preprocessor(tower: VisionTowerConfig) -> dict[str, Any] | None:
    """Contents of the tower's `preprocessor_config.json`; None where it has none."""
    source = tower.name if tower.revision else bundled_or_given(tower.name)
    path = cached_file(
        source,
        "preprocessor_config.json",
        revision=tower.revision or "main",
        _raise_exceptions_for_missing_entries=False,
    )
    return None if path is None else json.loads(Path(path).read_text())


def vision_settings(config: TrainConfig) -> VisionSettings:
    """Read how the vision tower sees an image; no weight is read.

    Raises:
        ValueError: It cannot be a vision tower.
    """
    check_vision_architecture(config)
    tower = config.vision_tower
    mean, std, resample = preprocessor_settings(_preprocessor(tower) or {})
    image_size = tower.image_size or vision_config(config).image_size
    return VisionSettings(tower.layer, image_size, mean, std, resample, config.image_decoder)
