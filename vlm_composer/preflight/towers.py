"""Towers and tokenizer by their configurations alone: to be had, of the right kind, large enough.

No weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from requests import ConnectionError, Timeout
from transformers import PretrainedConfig

from vlm_composer.assembly import (
    assemble_template,
    check_vision_architecture,
    language_config,
    vision_config,
    vision_warnings,
)
from vlm_composer.config import TrainConfig
from vlm_composer.config.model import LanguageModelConfig, TowerConfig
from vlm_composer.data.template import check_token_ids
from vlm_composer.models import tower_check
from vlm_composer.models.own_code import load_tokenizer
from vlm_composer.models.positions import count_positions
from vlm_composer.models.tower_loading import bundled_or_given
from vlm_composer.models.vision_layers import layers_below
from vlm_composer.preflight.finding import Findings

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HUB_SECONDS = 10


def check_vision_tower(config: TrainConfig, *, reads_weights: bool = True) -> Findings:
    """Look at the vision tower's configuration and, on the rank that reads them, its weights."""
    found, tower = Findings(), config.vision_tower
    if reads_weights:
        _find_weights(found, "vision_tower", tower)
    if not (shape := _configuration(found, tower, lambda: vision_config(config))):
        return found
    with found.failing():
        for warning in vision_warnings(config):
            found.warn(*warning)
        check_vision_architecture(config)
        layers = shape.num_hidden_layers
        if tower.layer != -1:
            layers = layers_below(tower.layer, layers)
        side = tower.image_size or shape.image_size
        patches = (side // shape.patch_size) ** 2
        found.ok(f"{tower.name}: {layers} layers, {patches} patches of {side} × {side} pixels")
    return found


def check_language_model(config: TrainConfig, *, reads_weights: bool = True) -> Findings:
    """Look at the language model's configuration and, on the rank that reads them, its weights."""
    found, tower = Findings(), config.language_model
    if reads_weights:
        _find_weights(found, "language_model", tower)
    if not (shape := _configuration(found, tower, lambda: language_config(config))):
        return found
    with found.failing():
        tower_check.check_language_model(tower.name, shape)
        if config.parallelism in ("shard", "hybrid") and shape.tie_word_embeddings:
            raise ValueError(
                f"parallelism: {config.parallelism} does not work with {tower.name}, whose "
                "embedding table is its head (tie_word_embeddings); use parallelism: replicate"
            )
        positions = count_positions(shape)
        if positions is not None and config.max_seq_len > positions[0]:
            found.fail(
                f"max_seq_len: {config.max_seq_len} is more than the {positions[0]} positions of "
                f"{tower.name} ({positions[1]})",
                f"set {positions[0]} or less",
            )
        found.ok(f"{tower.name}: {shape.num_hidden_layers} layers, width {shape.hidden_size}")
    return found


def check_tokenizer(config: TrainConfig) -> Findings:
    """Load the tokenizer and compare its ids with the rows of the language model's table."""
    found, tower = Findings(), config.language_model
    name = tower.tokenizer or tower.name
    if (obstacle := _obstacle(name, tower.revision, "tokenizer_config.json")) is not None:
        found.fail(f"tokenizer: {obstacle}")
        return found
    with found.failing():
        template = assemble_template(config)
        image_token = template.image_token_id
        shape = _configuration(Findings(), tower, lambda: language_config(config))
        if shape is None:
            found.ok(f"{name}: <image_patch> is {image_token}")
            return found
        try:
            rows = tower_check.check_language_model(tower.name, shape)
        except ValueError:  # which is found for the language model
            return found
        check_token_ids(template.tokenizer, rows, name=name, language_model=tower.name)
        _compare_with_own(found, tower, template.tokenizer)
        if image_token < rows:
            found.ok(f"{name}: <image_patch> is {image_token}, in a table of {rows:,} rows")
        else:
            found.ok(
                f"{name}: <image_patch> is {image_token}; the table of {rows:,} rows has none to "
                f"spare and will be resized to {image_token + 1:,}, frozen"
            )
    return found


def _compare_with_own(found: Findings, tower: LanguageModelConfig, tokenizer: Any) -> None:
    """Warn of another tokenizer than the language model's own, where that is at hand."""
    if (tower.tokenizer or tower.name) == tower.name:
        return
    if _local(tower.name, tower.revision, "tokenizer_config.json") is None:
        return
    own = load_tokenizer(tower.name, tower.revision).get_vocab()
    theirs = tokenizer.get_vocab()
    if other := sorted(token for token, id in own.items() if theirs.get(token) != id):
        found.warn(
            f"the tokenizer {tower.tokenizer} has another id, or none, for {len(other):,} of the "
            f"{len(own):,} tokens of {tower.name}'s own, such as {other[0]!r}",
            "leave language_model.tokenizer out, unless the model was trained with this one",
        )


def _configuration(
    found: Findings, tower: TowerConfig, read: Callable[[], PretrainedConfig]
) -> PretrainedConfig | None:
    """A tower's configuration; None where it cannot be read, which is then found."""
    source = tower.name if tower.revision else bundled_or_given(tower.name)
    if obstacle := _obstacle(source, tower.revision, "config.json"):
        if not found:  # its weights, where they are wanted, are missing for the same reason
            found.fail(obstacle)
        return None
    with found.failing():
        return read()
    return None


def _find_weights(found: Findings, section: str, tower: TowerConfig) -> None:
    if not tower.pretrained:
        return
    obstacles = [_obstacle(tower.name, tower.revision, name) for name in _WEIGHTS]
    indexes = [f"{name}.index.json" for name in _WEIGHTS]
    for index in indexes:
        obstacle = _obstacle(tower.name, tower.revision, index)
        path = _local(tower.name, tower.revision, index)
        if path is not None:
            names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
            missing = [n for n in names if _obstacle(tower.name, tower.revision, n)]
            if missing:
                obstacle = (
                    f"{tower.name} lacks {len(missing)} of its {len(names)} files of weights, the "
                    f"first is {missing[0]}; download it again"
                )
        obstacles.append(obstacle)
    if all(obstacles):
        # The one that is most to the point: files that an index names, else the usual file.
        named = [text for text in obstacles if text and " lacks " in text]
        found.fail(f"{section}: {(named or obstacles)[0]}")


def _local(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a model's folder or of the hub's cache."""
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(name, file, revision=revision or "main")
    except ValueError:  # no hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _obstacle(name: str, revision: str | None, file: str) -> str | None:
    """What keeps a model's file from being read; None where it is here or the hub has the model."""
    if _local(name, revision, file) is not None:
        return None
    if Path(name).is_dir():
        return f"{name} has no {file}; check the folder"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"there is no folder {name}; check the path, or give a hub id"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{name} is no folder and its {file} is not in the hub's cache "
            f"({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; check the name, download it "
            f"first (huggingface-cli download {name}), or unset HF_HUB_OFFLINE"
        )
    return _ask_hub(name, revision)


_asked: dict[tuple[str, str | None], str | None] = {}
"""Answers of the hub: a model has several files, and its cache may lack all of them."""


def _ask_hub(name: str, revision: str | None) -> str | None:
    if (name, revision) not in _asked:
        try:
            HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS)
            _asked[name, revision] = None
        except huggingface_hub.errors.GatedRepoError:
            text = f"{name} is gated; accept its terms on the hub, and set HF_TOKEN"
            _asked[name, revision] = text
        except (OSError, ValueError) as error:  # unknown, forbidden, or the hub is not reached
            reason = f"the hub answers: {' '.join(str(error).split())[:200]}"
            if isinstance(error, ConnectionError | Timeout):
                reason = f"the hub ({constants.ENDPOINT}) cannot be reached"
            _asked[name, revision] = (
                f"{name} is no folder and not in the hub's cache ({constants.HF_HUB_CACHE}), and "
                f"{reason}; check the name and the network, or download it where there is one"
            )
    return _asked[name, revision]
