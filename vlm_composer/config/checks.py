"""Values and combinations of a `TrainConfig` that cannot work, found before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import inf

from composer.core import Time, TimeUnit

from vlm_composer.config.reports import CallbacksConfig
from vlm_composer.config.run import TrainConfig
from vlm_composer.config.source_checks import source_mistakes
from vlm_composer.config.times import marked_times


def mistakes(config: TrainConfig) -> list[str]:
    """Return one line for each mistake, with the values and what to do."""
    return [
        *_out_of_range(config),
        *source_mistakes(config),
        *(_time_faults(config) or warmup_faults(config)),
        *_without_effect(config),
        *_batch_sizes(config),
    ]


def _out_of_range(config: TrainConfig) -> Iterator[str]:
    resampler = config.connector.resampler
    for key, value, least in (
        ("global_train_batch_size", config.global_train_batch_size, 1),
        ("connector.resampler.num_latents", resampler.num_latents, 1),
        ("connector.resampler.depth", resampler.depth, 1),
        ("connector.resampler.num_heads", resampler.num_heads, 1),
        ("connector.resampler.head_dim", resampler.head_dim, 1),
        ("connector.projector.mlp_ratio", config.connector.projector.mlp_ratio, 1),
        ("max_seq_len", config.max_seq_len, resampler.num_latents + 2),
        ("device_eval_batch_size", config.device_eval_batch_size or 1, 1),
        ("eval_subset_num_batches", config.eval_subset_num_batches, -1),
        ("save_num_checkpoints_to_keep", config.save_num_checkpoints_to_keep, -1),
        ("store_timeout", config.store_timeout, 0),
    ):
        if value < least:
            yield f"{key}: {value} is less than {least}"
    yield from _out_of_range_callbacks(config.callbacks)
    for side, loader in config.loaders.items():
        for name, number, smallest in (
            ("num_workers", loader.num_workers, 0),
            ("prefetch_factor", loader.prefetch_factor, 1),
            ("dataset.num_canonical_nodes", loader.dataset.num_canonical_nodes, 1),
            ("dataset.epoch_size", loader.dataset.epoch_size, 1),
            ("dataset.sampling_granularity", loader.dataset.sampling_granularity, 1),
        ):
            if number is not None and number < smallest:
                yield f"{side}_loader.{name}: {number} is less than {smallest}"
    if not 0 <= config.scheduler.alpha_f <= 1:
        yield f"scheduler.alpha_f: {config.scheduler.alpha_f} is not between 0 and 1"
    if not 0 < config.optimizer.lr < float("inf"):
        yield f"optimizer.lr: {config.optimizer.lr} is not a positive number"
    if config.optimizer.weight_decay < 0:
        yield f"optimizer.weight_decay: {config.optimizer.weight_decay} is less than 0"
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        yield f"optimizer.betas: {list(config.optimizer.betas)} are not both in [0, 1)"


def _out_of_range_callbacks(callbacks: CallbacksConfig) -> Iterator[str]:
    limits: list[tuple[str, float, float, float]] = []
    if (evidence := callbacks.evidence) is not None:
        limits += [
            ("evidence.num_samples", evidence.num_samples, 2, inf),
            ("evidence.num_choices", evidence.num_choices, 2, inf),
        ]
    if (captions := callbacks.captions) is not None:
        limits += [
            ("captions.num_images", captions.num_images, 1, inf),
            ("captions.max_new_tokens", captions.max_new_tokens, 1, inf),
        ]
    if (warnings := callbacks.warnings) is not None:
        limits += [
            ("warnings.gap_after", warnings.gap_after, 0, 1),
            ("warnings.loss_factor", warnings.loss_factor, 1, inf),
            ("warnings.gradient_factor", warnings.gradient_factor, 1, inf),
            ("warnings.min_output_spread", warnings.min_output_spread, 0, inf),
            ("warnings.max_dead_latents", warnings.max_dead_latents, 0, 1),
            ("warnings.max_data_wait", warnings.max_data_wait, 0, 1),
            ("warnings.window", warnings.window, 2, inf),
            ("warnings.cooldown", warnings.cooldown, 1, inf),
        ]
    for key, value, least, most in limits:
        if value < least:
            yield f"callbacks.{key}: {value} is less than {least}"
        elif value > most:
            yield f"callbacks.{key}: {value} is more than {most}"


def _time_faults(config: TrainConfig) -> list[str]:
    return [f"{key}: {fault}" for key, text, rule in marked_times(config) if (fault := rule(text))]


def warmup_faults(config: TrainConfig, epoch_batches: int | None = None) -> list[str]:
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


def _without_effect(config: TrainConfig) -> Iterator[str]:
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


def _batch_sizes(config: TrainConfig) -> Iterator[str]:
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
    elif microbatch < 1:
        yield f"device_train_microbatch_size: {microbatch} is less than 1"
