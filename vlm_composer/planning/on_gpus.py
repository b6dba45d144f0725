"""What N GPUs of a kind would take for a run: all that `plan` says of them, put together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vlm_composer.config import TrainConfig
from vlm_composer.data.mixing import epoch_size, mix_of
from vlm_composer.mds.index import INDEX_FILE, read_index
from vlm_composer.models.flops import TrainingFlops
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.planning.activations import measure_activations
from vlm_composer.planning.estimate import (
    Cluster,
    Room,
    Weights,
    memory_of_a_rank,
    recommend,
    speed,
)
from vlm_composer.planning.report import NOT_RUN
from vlm_composer.planning.scaling import scaling

EPOCH_SAMPLES = 546_965
"""LLaVA-Pretrain without the 2 % that are evaluated on, where nothing else is known."""

MICROBATCH_FOR_AUTO = 16
"""What `device_train_microbatch_size: auto` is planned as, at most."""


def microbatch_size(config: TrainConfig, gpus: int) -> int:
    """Samples of a micro-batch on one of N GPUs; `auto` is planned as `MICROBATCH_FOR_AUTO`."""
    size = config.device_train_microbatch_size
    if size == "auto":
        return max(min(MICROBATCH_FOR_AUTO, config.global_train_batch_size // gpus), 1)
    return size


def plan_on_gpus(
    config: TrainConfig,
    model: VisionLanguageModel,
    flops: TrainingFlops,
    cluster: Cluster,
    text_tokens: tuple[int, int],
) -> dict[str, Any]:
    """Plan memory, communication and time; the model's weights are faked and gone after it.

    Returns:
        `gpus`, `gpus_per_node`, `device`, `mfu`, `global_batch`, `microbatch`; `activation_bytes`
        (`kept`, `peak`); `memory_bytes` and `speed` for each `parallelism`, `hybrid` only over
        several nodes; `recommended` with its `reason`; `epoch_samples` and where they are
        `epoch_samples_from`; `cache_bytes` of the shards (None where unknown) and `features_bytes`;
        `scaling`, a row for each number of GPUs;
        `computed`, that nothing of it was run.
    """
    microbatch = microbatch_size(config, cluster.gpus)
    weights = Weights.of(model)
    tower = model.vision_tower
    patch_bytes = tower.num_patches * tower.hidden_size * next(tower.parameters()).element_size()
    activations = measure_activations(
        model,
        microbatch_size=microbatch,
        prompt_tokens=text_tokens[0],
        answer_tokens=text_tokens[1],
        autocast_dtype=None if config.precision == "fp32" else torch.bfloat16,
    )
    samples, samples_from, cache_bytes = _epoch(config)
    recommended, reason = recommend(weights, activations, Room.of(cluster))
    if recommended in ("shard", "hybrid") and config.cache_prompts:
        reason += "; it needs cache_prompts: false"
    batch = config.global_train_batch_size
    sizes = {"global_batch": batch, "microbatch": microbatch}
    # Within one node hybrid is shard.
    kinds = ("replicate", "hybrid", "shard") if cluster.nodes > 1 else ("replicate", "shard")
    return {
        "computed": NOT_RUN,
        "gpus": cluster.gpus,
        "gpus_per_node": cluster.gpus_per_node,
        "device": asdict(cluster.device),
        "mfu": cluster.mfu,
        **sizes,
        "activation_bytes": asdict(activations),
        "memory_bytes": {
            kind: memory_of_a_rank(
                weights, activations, shards=cluster.shards(kind), world_size=cluster.gpus
            )
            for kind in kinds
        },
        "recommended": recommended,
        "reason": reason,
        "speed": {
            kind: speed(weights, flops, cluster, **sizes, samples=samples, parallelism=kind)
            for kind in kinds
        },
        "epoch_samples": samples,
        "epoch_samples_from": samples_from,
        "cache_bytes": cache_bytes,
        "features_bytes": samples * patch_bytes,
        "scaling": scaling(weights, activations, flops, cluster, **sizes, samples=samples),
    }


def _epoch(config: TrainConfig) -> tuple[int, str, int | None]:
    """Samples of an epoch, where the number is from, and the bytes of their shards where known."""
    samples, samples_from, cache_bytes = EPOCH_SAMPLES, "LLaVA-Pretrain's, assumed", None
    loader = config.train_loader
    paths = {key: Path(source.place, INDEX_FILE) for key, source in loader.sources.items()}
    if all(path.is_file() for path in paths.values()):
        indexes = {key: read_index(path) for key, path in paths.items()}
        samples = epoch_size(mix_of(loader, {key: i.samples for key, i in indexes.items()}))
        samples_from = "of the shards' index"
        cache_bytes = sum(shard.raw.bytes for i in indexes.values() for shard in i.shards)
    elif loader.dataset.epoch_size is not None:
        samples, samples_from = loader.dataset.epoch_size, "epoch_size"
    report = config.callbacks.speed_report
    if report is not None and report.full_epoch_samples:
        samples, samples_from = report.full_epoch_samples, "full_epoch_samples"
    return samples, samples_from, cache_bytes
