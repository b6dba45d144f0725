"""The pass that makes features: image shards through the frozen vision tower, to MDS shards.

It is the one part of `convert/` that needs model code: it builds the vision tower as training does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer.utils import reproducibility
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from convert.claim import claim
from convert.destination import SUMMARY, open_destination
from convert.errors import ConversionError, Rejected
from convert.feature_plan import check_space, plan_features
from convert.split import Side
from convert.summary import FeatureSummary
from convert.writer import ShardWriter, publish_data_set, publish_text
from vlm_composer.assembly import (
    assemble_vision_tower,
    unloaded,
    vision_settings,
    vision_warnings,
)
from vlm_composer.config import TrainConfig
from vlm_composer.config.data import LoaderConfig
from vlm_composer.data.by_index import CaptionsByIndex
from vlm_composer.data.dataset import StreamingCaptions
from vlm_composer.data.encoder import Pixels
from vlm_composer.data.features import FeatureDtype, Features, FeaturesError, VisionSettings
from vlm_composer.data.leftovers import die_with_parent
from vlm_composer.data.opening import open_dataset
from vlm_composer.loaders import claim_data
from vlm_composer.mds.index import FEATURES_FILE
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.plain_text import say
from vlm_composer.training.hardware import choose_device
from vlm_composer.training.towers_identity import identify_tower

_DTYPES: dict[torch.dtype, FeatureDtype] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


def make_features(
    config: TrainConfig,
    out: str | Path,
    *,
    dtype: FeatureDtype | None = None,
    device: str | None = None,
    batch_size: int = 16,
    overwrite: bool = False,
    dry_run: bool = False,
    size_limit: int = 1 << 26,
    show_progress: bool = True,
) -> FeatureSummary | None:
    """Runs the vision tower of a training yaml over its data, and writes the patches as MDS shards.

    First prints what they take and when they pay. Writes `out`/train and, where the yaml has an
    eval_loader, `out`/eval, with the same samples in the same order and a `features.json` each;
    and, when all else is there, `out`/summary.json.

    Args:
        config: The training yaml; its data sets are of images.
        out: A folder or a URL, as for `convert_llava`.
        dtype: What patches are rounded to; None keeps them as the tower gives them.
        device: "cpu" or "gpu"; None takes the yaml's choice.
        batch_size: Images the tower sees at a time.
        overwrite: Delete a data set that `out` already holds.
        dry_run: Only print.
        size_limit: Bytes of a shard.
        show_progress: Show a progress bar on stderr.

    Returns:
        What summary.json says; None of a dry run.

    Raises:
        ConversionError: The data are features already, `out` holds them or a data set, it has no
            room, an upload fails, or patches do not fit `dtype`.
        ValueError: An image or a setting is wrong.
        OSError: Something cannot be read or written.
    """
    started, out = time.monotonic(), os.fspath(out)
    device = choose_device(device or config.device)
    sources = _sources(config)
    _check_apart(sources, out)
    claim_data(config)
    settings = vision_settings(config)
    for warning in vision_warnings(config):
        say("warning: {}; {}".format(*warning))
    sides = {side: _open_images(config, source) for side, source in sources.items()}

    unwritten = _describe(config, device, dtype, settings, sides)
    planned = plan_features(config, unwritten["train"], sides)
    print(planned.describe())
    check_space(planned.feature_bytes, out, overwrite)
    if dry_run:
        return None

    reproducibility.seed_all(config.seed)  # a tower with random weights is then training's
    tower = assemble_vision_tower(config, device)
    identity = identify_tower(config.vision_tower, tower)
    written = {
        side: replace(features, vision_tower=identity) for side, features in unwritten.items()
    }
    tower.to("cuda" if device == "gpu" else "cpu")
    with open_destination(out) as destination:
        claim(destination, overwrite)
        writers: dict[Side, ShardWriter] = {}
        with _progress(planned.num_samples, show_progress) as progress:
            for side, captions in sides.items():
                writer = ShardWriter(destination, side, size_limit, written[side].columns)
                writers[side] = writer
                loader = _load(captions, config, settings, batch_size, device)
                for record in _records(loader, tower, written[side]):
                    try:
                        writer.write(record)
                    except Rejected as rejected:
                        raise ConversionError(f"sample {record['id']}: {rejected}") from rejected
                    progress.update()
        beside = {side: {FEATURES_FILE: features.to_json()} for side, features in written.items()}
        publish_data_set(destination, writers, beside)
        summary = FeatureSummary(
            train=writers["train"].num_samples,
            eval=writers["eval"].num_samples if "eval" in writers else 0,
            shards={side: writer.num_shards for side, writer in writers.items()},
            bytes=sum(writer.num_bytes for writer in writers.values()),
            seconds=round(time.monotonic() - started, 3),
            sources={
                side: {"from": sources[side].sources["dataset"].place, **captions.fingerprint}
                for side, captions in sides.items()
            },
            settings=config.recorded(),
        )
        publish_text(destination, summary.to_json(), SUMMARY)
        destination.wait()
    return summary


def _sources(config: TrainConfig) -> dict[Side, LoaderConfig]:
    """The loaders of the sides, each of one data set."""
    sources: dict[Side, LoaderConfig] = {"train": config.train_loader}
    if config.eval_loader is not None:
        sources["eval"] = config.eval_loader
    for side, loader in sources.items():
        if loader.streams is not None:
            raise ConversionError(
                f"{side}_loader.streams: {', '.join(loader.streams)}, but features are written of "
                f"one data set at a time: give {side}_loader.streams=null and "
                f"{side}_loader.dataset.local (and remote) of each, with an --out of its own"
            )
    return sources


def _check_apart(sources: dict[Side, LoaderConfig], out: str) -> None:
    """Refuse to write over what is read, or over a cache of it."""
    for side, source in sources.items():
        for place in filter(None, (source.dataset.local, source.dataset.remote)):
            if _normal(place) in {_normal(f"{out.rstrip('/')}/{s}") for s in ("train", "eval")}:
                raise ConversionError(
                    f"{out} would overwrite {place}, where the images of {side} are read: write "
                    "the features to another place"
                )


def _normal(place: str) -> str:
    return place.rstrip("/") if "://" in place else os.path.realpath(place)


def _open_images(config: TrainConfig, source: LoaderConfig) -> StreamingCaptions:
    captions = open_dataset(source, batch_size=1, store_timeout=config.store_timeout)
    if captions.features:
        raise ConversionError(
            f"{source.sources['dataset'].place} holds features already: give the yaml's images"
        )
    return captions


def _describe(
    config: TrainConfig,
    device: str,
    dtype: FeatureDtype | None,
    settings: VisionSettings,
    sides: dict[Side, StreamingCaptions],
) -> dict[Side, Features]:
    """Say what will be written, but for the tower's identity; no weight is read."""
    with torch.device("meta"):
        tower = assemble_vision_tower(unloaded(config), device)
    return {
        side: Features(
            vision_tower={},
            settings=settings,
            dtype=dtype or _DTYPES[next(tower.parameters()).dtype],
            num_patches=tower.num_patches,
            hidden_size=tower.hidden_size,
            shuffle_units=[shard.samples for shard in captions.shards],
        )
        for side, captions in sides.items()
    }


def _load(
    captions: StreamingCaptions,
    config: TrainConfig,
    settings: VisionSettings,
    batch_size: int,
    device: str,
) -> DataLoader[Any]:
    return DataLoader(
        CaptionsByIndex(captions),  # in order: its own iteration deals samples to workers
        batch_size=batch_size,
        num_workers=config.train_loader.num_workers,
        worker_init_fn=die_with_parent,
        collate_fn=_WithText(settings),
        pin_memory=device == "gpu",
    )


class _WithText:
    """Makes a batch of images, beside the text of their records.

    Args:
        settings: How the tower sees them.
    """

    def __init__(self, settings: VisionSettings) -> None:
        self._pixels = Pixels(settings.image_size, settings.resample, settings.image_decoder)

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Return `pixel_values` uint8 (B, 3, S, S), and id, prompt and answer as `text`."""
        keys = ("id", "prompt", "answer")
        text = [{key: record[key] for key in keys} for record in records]
        return {**self._pixels(records), "text": text}


def _records(
    loader: DataLoader[Any], tower: VisionTower, features: Features
) -> Iterator[dict[str, Any]]:
    """Gives a record for every sample of a loader, in its order."""
    device = tower.image_mean.device
    for batch in loader:
        patches = tower(batch["pixel_values"].to(device, non_blocking=True))
        try:
            stored = features.encode(patches)
        except FeaturesError as error:
            ids = ", ".join(text["id"] for text in batch["text"])
            raise ConversionError(f"one of the samples {ids}: {error}") from error
        for text, values in zip(batch["text"], stored, strict=True):
            yield {**text, "patches": values}


def _progress(total: int, show: bool) -> Any:
    return tqdm(
        desc="features",
        total=total,
        unit=" samples",
        disable=not show,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants few lines
    )
