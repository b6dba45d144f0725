"""What an export is of: the run's settings and the model's configuration; no weight is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from vlm_composer.assembly import language_config, vision_config
from vlm_composer.config import TrainConfig
from vlm_composer.config.loader import build
from vlm_composer.config.model import TowerConfig
from vlm_composer.export.code_files import auto_map
from vlm_composer.export.remote_code.configuration_vlm_composer import VLMComposerConfig
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.training.checkpoint_file import CheckpointError, CheckpointFile
from vlm_composer.training.checkpoint_folder import checkpoint_name
from vlm_composer.training.towers_identity import Identity, hash_config

log = logging.getLogger(__name__)

ExportDtype = Literal["trained", "bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def name_of(document: Mapping[str, Any]) -> str:
    """What a checkpoint is called in its folder: a downloaded one has another name."""
    return checkpoint_name(document["timestamp"]["epoch"], document["timestamp"]["batch"])


def read_run(checkpoint: CheckpointFile, yaml: str | Path | None) -> TrainConfig:
    """The run's configuration, for towers that are looked at and not run."""
    if yaml is not None:
        log.info("Settings: those of %s.", yaml)
        config: TrainConfig | None = TrainConfig.read(yaml)
    else:
        log.info("Settings: those that the checkpoint was saved with.")
        errors: list[str] = []
        config = build(TrainConfig, checkpoint.document["settings"], "", errors)
        if errors:
            raise CheckpointError(
                f"the settings of {checkpoint.path} are not those of this version "
                f"({'; '.join(errors[:3])}); give the run's yaml with --yaml"
            )
    assert config is not None
    names = (config.vision_tower.name, config.language_model.name, config.language_model.tokenizer)
    if taken := [name for name in names if name and "${" in name]:
        raise CheckpointError(
            f"{checkpoint.path}: its run took {', '.join(taken)} from its environment, which a "
            "checkpoint does not choose from yours; give the run's yaml with --yaml"
        )
    config.compile_blocks = config.vision_tower.fuse_gelu = False
    for part in ("vision_tower", "language_model"):
        tower: TowerConfig = getattr(config, part)
        if not tower.pretrained:
            raise ValueError(
                f"{part}: its weights were random (pretrained: false) and are stored nowhere; an "
                "export would name towers that nobody can load"
            )
        tower.dtype = SHORT[checkpoint.document["towers"][part]["dtype"]]  # type: ignore[assignment]
        log.info("%s: %s%s.", part, tower.name, f" at {tower.revision}" if tower.revision else "")
    return config


def configuration_of(tower: TowerConfig, model: Any) -> dict[str, Any]:
    """The identity of a tower, as far as it is known without its weights."""
    return {
        "name": tower.name,
        "revision": tower.revision,
        "config_hash": hash_config(model.config, getattr(tower, "image_size", None)),
    }


def model_config(
    config: TrainConfig, model: VisionLanguageModel, identity: Identity, dtype: ExportDtype
) -> VLMComposerConfig:
    """The configuration of the exported model, which names the towers."""
    towers: dict[str, dict[str, Any]] = {}
    configs = {"vision_tower": vision_config(config), "language_model": language_config(config)}
    for part in configs:
        tower: TowerConfig = getattr(config, part)
        is_folder = Path(tower.name).is_dir()
        # The commit that the configuration was just read from, where the yaml names none.
        commit = None if is_folder else getattr(configs[part], "_commit_hash", None)
        towers[part] = {
            "name": str(Path(tower.name).resolve()) if is_folder else tower.name,
            "revision": tower.revision or commit,
        }
    text_config = configs["language_model"]
    towers["language_model"]["vocab_size"] = text_config.vocab_size
    text_config.vocab_size = max(text_config.vocab_size, model.language_model.vocab_size)
    trained = identity["language_model"]["dtype"]
    torch_dtype = DTYPES[dtype if dtype != "trained" else SHORT[trained]]
    for part_config in configs.values():  # or "auto" would take what the towers' files say
        part_config.torch_dtype = torch_dtype
        part_config._name_or_path = ""  # where it was read, which means nothing elsewhere
    return VLMComposerConfig(
        vision_config=configs["vision_tower"],
        text_config=text_config,
        connector={
            **asdict(config.connector.resampler),
            **asdict(config.connector.projector),
            "vision_ln": config.connector.vision_ln,
        },
        vision_layer=config.vision_tower.layer,
        image_size=config.vision_tower.image_size,
        image_token_id=model.image_token_id,
        towers=towers,
        torch_dtype=torch_dtype,
        architectures=["VLMComposerForConditionalGeneration"],
        auto_map=auto_map("AutoConfig", "AutoModelForVision2Seq", "AutoModelForImageTextToText"),
    )
