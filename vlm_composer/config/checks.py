"""Combinations of a run's settings that cannot work, found before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator

from composer.core import Time, TimeUnit

from vlm_composer.config.run import RunSettings
from vlm_composer.config.source_checks import source_mistakes
from vlm_composer.config.times import RUN_LENGTH, WARMUP


def mistakes(config: RunSettings) -> list[str]:
    """Return one line for each mistake, with the values and what to do."""
    return [
        *_lengths(config),
        *source_mistakes(config),
        *_without_effect(config),
        *_batch_sizes(config),
    ]


def _lengths(config: RunSettings) -> Iterator[str]:
    least = config.connector.resampler.num_latents + 2
    if config.max_seq_len < least:
        yield f"max_seq_len: {config.max_seq_len} is less than {least}"
    times = (RUN_LENGTH, config.max_duration), (WARMUP, config.scheduler.t_warmup)
    if not any(rule.fault_of(time) for rule, time in times):
        yield from warmup_faults(config)


def warmup_faults(config: RunSettings, epoch_batches: int | None = None) -> list[str]:
    """Compare the warm-up with the length of the run.

    Args:
        config: The run; its times are valid.
        epoch_batches: Batches of an epoch; None where it is not known, and ep and ba are then not
            compared.

    Returns:
        One line where Composer would refuse the warm-up, or the learning rate would never reach
        `optimizer.lr`.
    """
    length = Time.from_timestring(config.max_duration)
    warmup = Time.from_timestring(config.scheduler.t_warmup)
    key = f"scheduler.t_warmup: {config.scheduler.t_warmup!r}"
    run = f"max_duration: {config.max_duration!r}"
    batches = {TimeUnit.EPOCH: epoch_batches, TimeUnit.BATCH: 1}
    if warmup.unit == TimeUnit.DURATION:
        return []
    if warmup.unit == length.unit:
        too_long = warmup.value > length.value
    elif warmup.unit in batches and length.unit in batches:
        warmup_of, length_of = batches[warmup.unit], batches[length.unit]
        if warmup_of is None or length_of is None:
            return []
        too_long = warmup.value * warmup_of > length.value * length_of
        run += f" (an epoch has {epoch_batches} batches)"
    else:
        unit = length.unit.value
        return [f"{key} is not in the unit of {run}; give it in {unit} or dur"]
    return [f"{key} is longer than {run}; give that or less"] if too_long else []


def _without_effect(config: RunSettings) -> Iterator[str]:
    for key, tower in (
        ("vision_tower", config.vision_tower),
        ("language_model", config.language_model),
    ):
        if tower.pretrained and tower.config_overrides:
            yield (
                f"{key}.config_overrides: cannot change the shape of pretrained weights; remove "
                "it or set pretrained: false"
            )
    parallelism = config.parallelism
    if config.fsdp_config is not None and parallelism == "replicate":
        yield (
            "fsdp_config: has no effect with parallelism: replicate; set shard or hybrid, or "
            "remove it"
        )
    degree = config.shard_degree
    if degree is not None and parallelism != "hybrid":
        yield (
            "fsdp_config.data_parallel_shard_degree: has no effect with parallelism: "
            f"{parallelism}; set hybrid or remove it"
        )
    if config.vision_tower.fuse_gelu is True and (
        config.device == "gpu" or parallelism != "replicate"
    ):
        yield "vision_tower.fuse_gelu: only on a CPU with parallelism: replicate; set it to auto"
    if config.cache_prompts and parallelism in ("shard", "hybrid"):
        yield f"cache_prompts: does not work with parallelism: {parallelism}; set it to false"
    if config.autoresume and config.save_folder is None:
        yield "autoresume: needs a save_folder to resume from"
    if config.autoresume and config.save_overwrite:
        yield "save_overwrite: would replace the checkpoints of autoresume; choose one"
    if config.save_num_checkpoints_to_keep == 0:
        yield "save_num_checkpoints_to_keep: 0 would keep none; give 1 or more, or -1 for all"
    if config.load_weights_only and config.load_path is None:
        yield "load_weights_only: has no effect without load_path"
    if config.eval_loader is not None and config.eval_loader.drop_last:
        yield "eval_loader.drop_last: must be false, every evaluation sample counts once"
    if config.eval_loader is None and config.eval_first:
        yield "eval_first: needs an eval_loader"
    for key in ("evidence", "captions"):
        if config.eval_loader is None and getattr(config.callbacks, key) is not None:
            yield f"callbacks.{key}: needs an eval_loader"


def _batch_sizes(config: RunSettings) -> Iterator[str]:
    microbatch, batch = config.device_train_microbatch_size, config.global_train_batch_size
    # The launcher sets WORLD_SIZE before the script starts.
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    degree = config.shard_degree
    if degree is not None and (degree < 1 or world_size % degree):
        yield (
            f"fsdp_config.data_parallel_shard_degree: {degree} does not divide the {world_size} "
            "ranks; leave it out for the ranks of a node"
        )
    if batch >= 1 and batch % world_size:
        yield (
            f"global_train_batch_size: {batch} does not divide by the {world_size} ranks; "
            f"use {max(batch // world_size, 1) * world_size} or another multiple"
        )
    if microbatch == "auto":
        if config.device == "cpu":
            yield "device_train_microbatch_size: auto works on a GPU only; give a number"
        if config.parallelism != "replicate":
            yield (
                "device_train_microbatch_size: auto does not work with parallelism: "
                f"{config.parallelism}; give a number"
            )
