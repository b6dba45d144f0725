"""Room on this machine's disks and in its shared memory for what a run will write there."""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from composer.core import Time, TimeUnit
from composer.utils import dist
from streaming.base.util import bytes_to_int

from vlm_composer.assembly import (
    assemble_connector,
    language_config,
    vision_config,
    vision_settings,
)
from vlm_composer.config import TrainConfig
from vlm_composer.data.cache_room import disk_needs, existing
from vlm_composer.data.leftovers import SHARED_MEMORY
from vlm_composer.data.mixing import epoch_size
from vlm_composer.plan import CHECKPOINT_BYTES_PER_PARAMETER
from vlm_composer.preflight.finding import Findings, counted, readable
from vlm_composer.preflight.shards import Side, mix_of_side
from vlm_composer.storage import open_store
from vlm_composer.training.checkpoint_folder import checkpoints_among
from vlm_composer.training.freezing import count_parameters


@dataclass(frozen=True)
class _Need:
    """What a run writes to a folder: `least` bytes to be of use at all, `most` in the end."""

    what: str
    folder: Path
    least: float
    most: float


def check_disk(config: TrainConfig, sides: Mapping[str, Side], *, checkpoints: bool) -> Findings:
    """Compare the free bytes of each file system with what goes there: caches and checkpoints.

    Args:
        config: The run.
        sides: The data sets whose index could be read.
        checkpoints: This rank writes them, and the towers' widths are known.
    """
    found = Findings()
    needs = _caches(found, config, sides)
    if checkpoints and config.save_folder is not None:
        with found.failing():
            needs += _checkpoints(config, sides)
    disks: dict[int, list[_Need]] = defaultdict(list)
    for need in needs:
        disks[os.stat(existing(need.folder)).st_dev].append(need)
    for on_disk in disks.values():
        _compare(found, on_disk)
    return found


def check_shared_memory(config: TrainConfig, sides: Mapping[str, Side]) -> Findings:
    """Compare /dev/shm with the batches that loaders' workers hand over in it."""
    found, loader = Findings(), config.train_loader
    if not loader.num_workers or not SHARED_MEMORY.is_dir():
        return found
    with found.failing():
        train = sides.get("train", {})
        features = [one.features.sample_bytes for one in train.values() if one.features]
        sample = max(features, default=3 * vision_settings(config).image_size ** 2)
        batch = config.global_train_batch_size // dist.get_world_size() * sample
        # What a worker prepares ahead, and the one of its batches that is in use: its memory for
        # them stays (see `data.batch_memory`).
        of_a_worker = loader.prefetch_factor + 1
        held = dist.get_local_world_size() * loader.num_workers * of_a_worker
        free = shutil.disk_usage(SHARED_MEMORY).free
        text = (
            f"{SHARED_MEMORY} has {readable(free)} free; workers hold {readable(held * batch)} "
            f"({counted(held, 'batch')} of {readable(batch)})"
        )
        advice = (
            "give the container more (docker run --shm-size), or set train_loader.num_workers or "
            "prefetch_factor lower"
        )
        if free < batch:
            found.fail(text, advice)
        elif free < held * batch:
            found.warn(text, advice)
        else:
            found.ok(text)
    return found


def _caches(found: Findings, config: TrainConfig, sides: Mapping[str, Side]) -> list[_Need]:
    needs = []
    for side, shards in sides.items():
        loader = config.loaders[side]
        caches = {
            Path(source.local): shards[key].cached
            for key, source in loader.sources.items()
            if source.remote is not None and key in shards
        }
        if not caches:
            continue
        with found.failing():
            limit = None
            if loader.dataset.cache_limit:
                limit = bytes_to_int(loader.dataset.cache_limit)
                largest = max(one.largest for one in shards.values())
                least = max(4 * largest, sum(len(one.index) for one in shards.values()) + 1)
                if limit < least:
                    raise ValueError(
                        f"{side}_loader.dataset.cache_limit: {limit:,} bytes are less than four of "
                        f"the largest shard ({largest:,} bytes), which streaming needs; set "
                        f"{least:,} or more, or leave it out"
                    )
            for need in disk_needs(caches, limit):
                what = f"the cache of {side} in {', '.join(map(str, need.folders))}"
                needs.append(_Need(what, need.folders[0], need.missing, need.missing))
    return needs


def _checkpoints(config: TrainConfig, sides: Mapping[str, Side]) -> list[_Need]:
    """What checkpoints take in a local save_folder, or on their way to a bucket."""
    assert config.save_folder is not None
    url, size = config.folder(config.save_folder), _checkpoint_bytes(config)
    if "://" in url:
        folder = Path(config.folder("{run_folder}/scratch"))
        return [_Need(f"a checkpoint on its way in {folder}", folder, size, size)]
    store = open_store(url)
    saved = store.sizes()
    earlier = [] if config.save_overwrite else checkpoints_among(saved)
    present = sum(saved[name] for name in earlier)
    number = _saves(config, sides)
    if (keep := config.save_num_checkpoints_to_keep) > 0:
        # Old ones go once the newest is there. Of earlier runs' this run knows one to be whole.
        number = min(number, keep + max(1, len(earlier) - 1))
    most = max(number * size - present, size)
    what = f"{counted(number, 'checkpoint')} of {readable(size)} in {url}"
    return [_Need(what, Path(url), size, most)]


def _checkpoint_bytes(config: TrainConfig) -> int:
    widths = [read(config).hidden_size for read in (vision_config, language_config)]
    with torch.device("meta"):
        return CHECKPOINT_BYTES_PER_PARAMETER * count_parameters(
            assemble_connector(config, *widths)
        )


def _saves(config: TrainConfig, sides: Mapping[str, Side]) -> int:
    """How many checkpoints a run saves; one where that cannot be told."""
    interval, duration = (
        Time.from_timestring(text) for text in (config.save_interval, config.max_duration)
    )
    if interval.unit == TimeUnit.DURATION:
        return math.ceil(1 / interval.value)
    mix = mix_of_side(config, "train", sides.get("train", {}))
    per_epoch = epoch_size(mix) / config.global_train_batch_size if mix else math.inf
    batches = {
        TimeUnit.BATCH: 1.0,
        TimeUnit.EPOCH: per_epoch,
        TimeUnit.SAMPLE: 1 / config.global_train_batch_size,
    }
    if interval.unit == duration.unit:
        return math.ceil(duration.value / interval.value)
    if interval.unit not in batches or duration.unit not in batches or per_epoch == math.inf:
        return 1
    count = duration.value * batches[duration.unit] / (interval.value * batches[interval.unit])
    return max(math.ceil(count), 1)


def _compare(found: Findings, needs: list[_Need]) -> None:
    """Compare the needs of one file system with what it has free."""
    path = existing(needs[0].folder)
    free = shutil.disk_usage(path).free
    least, most = (sum(n.least for n in needs), sum(n.most for n in needs))
    what = ", ".join(f"{need.what}: {readable(need.most)}" for need in needs)
    text = f"{readable(free)} free at {path}; {what}"
    advice = (
        "free some space, choose another folder, or set dataset.cache_limit or "
        "save_num_checkpoints_to_keep lower"
    )
    if free < least:
        found.fail(text, advice)
    elif free < most:
        found.warn(text, advice)
    else:
        found.ok(text)
