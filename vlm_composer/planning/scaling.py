"""One recipe on other numbers of GPUs: how its batch divides, and what each would take."""

from __future__ import annotations

import math
from typing import Any

from vlm_composer.models.flops import TrainingFlops
from vlm_composer.planning.activations import ActivationBytes
from vlm_composer.planning.estimate import (
    Cluster,
    Room,
    Weights,
    memory_of_a_rank,
    recommend,
    speed,
)


def check_batch(global_batch: int, gpus: int, microbatch: int) -> None:
    """Refuse a global batch that micro-batches cannot make up.

    Raises:
        ValueError: It does not divide over them.
    """
    if global_batch % (gpus * microbatch):
        whole = math.ceil(global_batch / (gpus * microbatch)) * gpus * microbatch
        smaller = _fitting_microbatch(global_batch, gpus, microbatch)
        raise ValueError(
            f"global_train_batch_size: {global_batch} does not divide over {gpus} GPUs × "
            f"{microbatch} (device_train_microbatch_size) = {gpus * microbatch}; use "
            f"global_train_batch_size={whole}"
            + (f" or device_train_microbatch_size={smaller}" if smaller else "")
        )


def batch_on(global_batch: int, gpus: int, microbatch: int) -> tuple[int, int]:
    """Fit a batch to another number of GPUs: the same where it divides over them, else the next
    that does; the largest micro-batch, up to the one given, that divides it."""
    fitted = math.ceil(global_batch / gpus) * gpus
    return fitted, _fitting_microbatch(fitted, gpus, microbatch)


def _fitting_microbatch(global_batch: int, gpus: int, most: int) -> int:
    """Largest micro-batch up to `most`; 0 where the batch does not divide over the GPUs."""
    if global_batch % gpus:
        return 0
    each = global_batch // gpus
    return max(size for size in range(1, min(most, each) + 1) if each % size == 0)


def scaling(
    weights: Weights,
    activations: ActivationBytes,
    flops: TrainingFlops,
    cluster: Cluster,
    *,
    global_batch: int,
    microbatch: int,
    samples: int,
) -> list[dict[str, Any]]:
    """The plan for 1, 8, 64 and 512 GPUs of the cluster's kind, a row each.

    Memory is that of the given micro-batch, an upper bound where `batch_on` makes it smaller.
    """
    rows = []
    for gpus in (1, 8, 64, 512):
        node = min(cluster.gpus_per_node, gpus)
        if gpus % node:
            continue  # not whole nodes
        other = Cluster(cluster.device, gpus, cluster.gpus_per_node, cluster.mfu)
        parallelism, _ = recommend(weights, activations, Room.of(other))
        batch, size = batch_on(global_batch, gpus, microbatch)
        row: dict[str, Any] = {
            "gpus": gpus,
            "parallelism": parallelism,
            "global_batch": batch,
            "microbatch": size,
        }
        if parallelism is not None:
            memory = memory_of_a_rank(
                weights, activations, shards=other.shards(parallelism), world_size=gpus
            )
            row["memory"] = memory["total"]
            row |= speed(
                weights,
                flops,
                other,
                global_batch=batch,
                microbatch=size,
                samples=samples,
                parallelism=parallelism,
            )
        rows.append(row)
    return rows
