"""From the configuration to the parts: template, model, loaders.

The one place that knows both the yaml and the classes; `train.py`, `plan.py` and the demo build
with it.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from composer import DataSpec, Evaluator
from composer.utils import dist
from PIL.Image import Resampling
from streaming import StreamingDataLoader
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from transformers.utils import cached_file

from vlm_composer.config import TrainConfig
from vlm_composer.config.data import LoaderConfig
from vlm_composer.config.model import TowerConfig, VisionTowerConfig
from vlm_composer.data.by_index import CaptionsByIndex
from vlm_composer.data.collate import collate, num_samples, num_tokens, split_batch
from vlm_composer.data.dataset import SampleEncoder, StreamingCaptions
from vlm_composer.data.features import Features, VisionSettings
from vlm_composer.data.images import TORCH_FILTERS, preprocessor_settings
from vlm_composer.data.leftovers import claim_caches, live_as_parent
from vlm_composer.data.mixing import describe_mix, is_mixed
from vlm_composer.data.opening import open_dataset
from vlm_composer.data.template import Template
from vlm_composer.models.connector import Connector
from vlm_composer.models.frozen_blocks import compile_blocks
from vlm_composer.models.fused_gelu import fuse_gelu
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler
from vlm_composer.models.tower_loading import (
    bundled_or_given,
    load_language_model,
    load_vision_model,
    read_config,
)
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.training.hardware import compile_obstacle, storage_dtype

log = logging.getLogger(__name__)


def assemble_template(config: TrainConfig) -> Template:
    """Load the tokenizer and make the template.

    Raises:
        OSError: The tokenizer is neither a folder nor on a hub that can be reached.
        ValueError: It lacks a token that the template needs.
    """
    name = config.language_model.tokenizer or config.language_model.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.language_model.revision or "main"
        )
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
            get them from another.

    Returns:
        The model, towers frozen.

    Raises:
        ValueError: The towers cannot be used, or the device cannot do what the yaml insists on.
    """
    vision_tower = assemble_vision_tower(config, device, empty=empty_towers)
    language_model = LanguageModel(
        load_language_model(**_tower_options(config.language_model, device), empty=empty_towers)
    )
    if image_token_id is None:
        image_token_id = language_model.vocab_size - 1
    if language_model.ensure_rows(image_token_id + 1):
        log.info(
            "The embedding table had no spare row for <image_patch>: resized to %d rows, frozen.",
            language_model.vocab_size,
        )
    if _compiles(config, device):
        blocks = compile_blocks(language_model.model)
        log.info("Compiled blocks: %s.", ", ".join(blocks) or "none is known in this model")
    connector = assemble_connector(config, vision_tower.hidden_size, language_model.hidden_size)
    return VisionLanguageModel(vision_tower, connector, language_model, image_token_id)


def assemble_vision_tower(config: TrainConfig, device: str, *, empty: bool = False) -> VisionTower:
    """Build the vision tower alone; arguments as for `assemble_model`."""
    mean, std, _ = preprocessor_settings(_preprocessor(config.vision_tower))
    tower = VisionTower(
        load_vision_model(
            **_tower_options(config.vision_tower, device),
            empty=empty,
            attn_implementation=config.vision_tower.attn_implementation,
        ),
        layer=config.vision_tower.layer,
        image_size=config.vision_tower.image_size,
        image_mean=mean,
        image_std=std,
    )
    fuses = config.vision_tower.fuse_gelu
    if fuses is True and device == "gpu":
        raise ValueError("vision_tower.fuse_gelu: true, but it is for a CPU; set it to auto")
    if fuses == "auto":
        fuses = device == "cpu" and config.parallelism == "replicate"
    if fuses:
        log.info("Linear layers with GELU in one: %d.", fuse_gelu(tower.model))
    return tower


def _compiles(config: TrainConfig, device: str) -> bool:
    if config.compile_blocks is False:
        return False
    obstacle = compile_obstacle(device)
    if obstacle is None:
        return True
    if config.compile_blocks is True:
        raise ValueError(
            f"compile_blocks: true, but {obstacle}; install it, or set compile_blocks: false"
        )
    log.info("Blocks are not compiled: %s.", obstacle)
    return False


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


def _preprocessor(tower: VisionTowerConfig) -> dict[str, Any]:
    """Contents of the tower's `preprocessor_config.json`; empty where it has none."""
    source = tower.name if tower.revision else bundled_or_given(tower.name)
    path = cached_file(
        source,
        "preprocessor_config.json",
        revision=tower.revision or "main",
        _raise_exceptions_for_missing_entries=False,
    )
    if path is None:
        log.warning("%s has no preprocessor_config.json: mean and std 0.5, bicubic", tower.name)
        return {}
    return json.loads(Path(path).read_text())


def vision_settings(config: TrainConfig) -> VisionSettings:
    """Read how the vision tower sees an image; no weight is read."""
    tower = config.vision_tower
    mean, std, resample = preprocessor_settings(_preprocessor(tower))
    image_size = (
        tower.image_size
        or read_config(
            tower.name, revision=tower.revision, overrides=tower.config_overrides
        ).image_size
    )
    if config.image_decoder == "torchvision" and resample not in TORCH_FILTERS:
        log.warning(
            "%s scales its images with %s, which torch does not have: PIL decodes and scales.",
            tower.name,
            Resampling(resample).name,
        )
    return VisionSettings(tower.layer, image_size, mean, std, resample, config.image_decoder)


def assemble_encoder(config: TrainConfig, template: Template) -> SampleEncoder:
    """Make what turns a record into tensors, for the tower's image size; no weight is read."""
    vision = vision_settings(config)
    return SampleEncoder(
        template,
        image_size=vision.image_size,
        resample=vision.resample,
        image_decoder=vision.image_decoder,
    )


def assemble_train_loader(config: TrainConfig, encoder: SampleEncoder, device: str) -> DataSpec:
    """Make the training loader.

    torch.distributed must be initialised where there are several ranks: StreamingDataset asks it.

    Raises:
        ValueError: The set is smaller than one batch.
    """
    batch_size = config.global_train_batch_size // dist.get_world_size()
    captions = _open_dataset(config, config.train_loader, encoder, batch_size)
    if config.train_loader.drop_last and captions.epoch_size < config.global_train_batch_size:
        raise ValueError(
            f"train_loader: an epoch of {captions.epoch_size} samples is less than one batch of "
            f"{config.global_train_batch_size} (global_train_batch_size)"
        )
    if is_mixed(captions.mix):
        log.info("Of the training data, %s.", describe_mix(captions.mix))
    if len(captions.mix) > 1 and not captions.shuffle:
        log.warning(
            "train_loader.dataset.shuffle: false, so that the streams are read one after the other."
        )
    loader = StreamingDataLoader(
        captions,
        batch_size=batch_size,
        drop_last=config.train_loader.drop_last,
        **_loader_options(config.train_loader, device),
    )
    return _data_spec(loader)


def assemble_evaluators(
    config: TrainConfig, encoder: SampleEncoder, device: str
) -> list[Evaluator]:
    """Make the evaluators: `eval`, and `eval_mismatched` where the yaml asks for it."""
    if config.eval_loader is None:
        return []
    batch_size = config.device_eval_batch_size
    if batch_size is None:
        microbatch = config.device_train_microbatch_size
        batch_size = microbatch if isinstance(microbatch, int) else 8
    captions = _open_dataset(config, config.eval_loader, encoder, batch_size)
    shifts = {"eval": 0}
    if config.eval_loader.mismatched_images:
        # From half the set away: neighbours in a data set are often alike.
        shifts["eval_mismatched"] = max(captions.num_samples // 2, 1)
    evaluators = []
    for label, shift in shifts.items():
        dataset = CaptionsByIndex(captions, image_shift=shift)
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=dist.get_sampler(dataset, drop_last=False, shuffle=False),
            # Its own, so that an evaluation does not move the generator that training draws from: a
            # run that is stopped during one must resume exactly.
            generator=torch.Generator(),
            **_loader_options(config.eval_loader, device),
        )
        evaluators.append(
            Evaluator(
                label=label,
                dataloader=_data_spec(loader),
                device_eval_microbatch_size=batch_size,
                subset_num_batches=config.eval_subset_num_batches,
            )
        )
    return evaluators


def claim_data(config: TrainConfig) -> None:
    """Take this run's caches and free what killed runs hold of them; one rank of a node calls it.

    Raises:
        ValueError: A living run reads into the same cache.
    """
    claim_caches(caches_of(config))


def caches_of(config: TrainConfig) -> list[str]:
    """Folders that this run downloads shards to."""
    sources = [x for loader in config.loaders.values() for x in loader.sources.values()]
    return [source.local for source in sources if source.remote is not None]


def features_of(train: DataSpec, evaluators: list[Evaluator]) -> list[Features]:
    """Collect what the data sets say of their patches; data sets of images say nothing."""
    loaders: list[Any] = [train.dataloader, *(e.dataloader.dataloader for e in evaluators)]
    return [features for x in loaders for features in x.dataset.features.values()]


def _open_dataset(
    config: TrainConfig, loader: LoaderConfig, encoder: SampleEncoder, batch_size: int
) -> StreamingCaptions:
    captions = open_dataset(
        loader, encoder, batch_size=batch_size, store_timeout=config.store_timeout
    )
    for name, features in captions.features.items():
        features.check_settings(vision_settings(config), loader.sources[name].place)
        captions.encoder = encoder.reading(features)
    return captions


def _loader_options(loader: LoaderConfig, device: str) -> dict[str, Any]:
    workers = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": True}
    return {
        "num_workers": loader.num_workers,
        "worker_init_fn": live_as_parent,
        "collate_fn": collate,
        "pin_memory": device == "gpu",
        **(workers if loader.num_workers else {}),
    }


def _data_spec(loader: DataLoader[Any]) -> DataSpec:
    return DataSpec(
        loader,
        split_batch=split_batch,
        get_num_samples_in_batch=num_samples,
        get_num_tokens_in_batch=num_tokens,
    )
