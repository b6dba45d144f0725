"""Ranks, nodes and how the batch is cut over them: what would hang or fail, and what is wasted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from composer.utils import dist

from vlm_composer.config import TrainConfig
from vlm_composer.preflight.finding import Findings, counted


class Placement(NamedTuple):
    """Where a rank is, by what its launcher says."""

    world_size: int = 1
    local_size: int = 1
    rank: int = 0
    node: int = 0
    local_rank: int = 0

    @classmethod
    def of_this_rank(cls) -> Placement:
        """Read the launcher's environment."""
        return cls(
            dist.get_world_size(),
            dist.get_local_world_size(),
            dist.get_global_rank(),
            dist.get_node_rank(),
            dist.get_local_rank(),
        )


def count_gpus(device: str) -> int | None:
    """GPUs of this machine, for a run on GPUs."""
    return torch.cuda.device_count() if device == "gpu" else None


def check_ranks(placement: Placement, gpus: int | None) -> Findings:
    """Look at what the launcher says of a rank; before ranks meet, as wrong ones never do.

    Args:
        placement: The rank's.
        gpus: Of its machine; None for a run without.
    """
    found = Findings()
    world_size, local_size, rank, node, local_rank = placement
    command = (
        "start the same number of ranks on every node, as the command in docs/multinode.md does"
    )
    if not 0 < local_size <= world_size or world_size % local_size:
        # streaming counts nodes by dividing.
        found.fail(
            f"{counted(world_size, 'rank')} (WORLD_SIZE) are not a number of whole nodes of "
            f"{local_size} (LOCAL_WORLD_SIZE)",
            command,
        )
    elif not 0 <= rank < world_size or rank != node * local_size + local_rank:
        found.fail(
            f"rank {rank} of {world_size} (RANK, WORLD_SIZE) is not number {local_rank} "
            f"(LOCAL_RANK) of node {node} (NODE_RANK) with {local_size} ranks each",
            f"{command}; it gives --base_rank {node * local_size} on --node_rank {node}",
        )
    if gpus is not None and local_size > gpus:
        found.fail(
            f"{counted(local_size, 'rank')} on this machine and {counted(gpus, 'GPU')}",
            f"start with composer -n {gpus}",
        )
    elif gpus is not None and local_size < gpus:
        found.warn(
            f"{counted(local_size, 'rank')} on this machine and {counted(gpus, 'GPU')}",
            f"start with composer -n {gpus}, or hide them with CUDA_VISIBLE_DEVICES",
        )
    if not found:
        nodes = world_size // local_size
        found.ok(f"{counted(world_size, 'rank')} on {counted(nodes, 'node')}")
    return found


def check_batch(config: TrainConfig, placement: Placement) -> Findings:
    """Look at how a batch is cut over ranks and micro-batches; the yaml's checks see that it
    divides over ranks.

    A rank's batch that is not a multiple of the micro-batch is right: streaming gives every rank as
    many samples as any other, so that all make the same number of passes, and a pass counts by its
    answer tokens.
    """
    found = Findings()
    world_size = placement.world_size
    nodes = max(world_size // placement.local_size, 1)
    canonical = config.train_loader.dataset.num_canonical_nodes
    if max(canonical, nodes) % min(canonical, nodes):
        found.fail(
            f"train_loader.dataset.num_canonical_nodes: {canonical} does not divide the {nodes} "
            "nodes, nor they it, which streaming refuses",
            f"set 1 or {nodes}",
        )
    batch, microbatch = config.global_train_batch_size, config.device_train_microbatch_size
    per_rank = batch // world_size
    if microbatch == "auto":
        found.ok(f"{batch} a step, {per_rank} a rank, micro-batches as they fit")
        return found
    if microbatch > per_rank:
        found.warn(
            f"device_train_microbatch_size: {microbatch} is more than the {per_rank} samples of a "
            f"rank ({batch} over {world_size} ranks), which go through in one pass",
            f"set {per_rank}, or a larger global_train_batch_size",
        )
    elif rest := per_rank % microbatch:
        even = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        best = max((size for size in even if size <= microbatch), default=1)
        found.warn(
            f"device_train_microbatch_size: {microbatch} does not divide the {per_rank} samples of "
            f"a rank: the last pass of a step has {rest}. The gradient is right, the pass is slow",
            f"set {best}, or another divisor of {per_rank}",
        )
    else:
        ranks, passes = counted(world_size, "rank"), counted(per_rank // microbatch, "pass")
        found.ok(f"{batch} a step = {ranks} × {passes} × {microbatch}")
    return found
