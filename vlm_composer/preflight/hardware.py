"""The device: what it is, what it is slow at, and whether a rank's memory fits."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import torch
from composer.utils import dist

from vlm_composer.assembly import compile_refusal, fusing_refusal
from vlm_composer.config import TrainConfig
from vlm_composer.planning.activations import InconclusiveError
from vlm_composer.planning.choose import weights_and_activations
from vlm_composer.planning.estimate import FREE_SHARE, memory_of_a_rank
from vlm_composer.preflight.finding import Findings, readable
from vlm_composer.training.hardware import (
    CONTROL_GROUP,
    container_limit,
    has_native_bf16,
)
from vlm_composer.training.parallelism import ranks_of_a_copy


def check_device(config: TrainConfig, device: str) -> Findings:
    """Say what the run computes on, and what that is not made for."""
    found = Findings()
    bf16 = has_native_bf16(device)
    if device == "gpu":
        properties = torch.cuda.get_device_properties(dist.get_local_rank())
        name, advice = properties.name, "set fp32 or auto"
        found.ok(f"{name}, {readable(properties.total_memory)}, torch {torch.__version__}")
    else:
        name, advice = "this CPU", "set auto, or fp32"
        threads = torch.get_num_threads()
        kind = "with bf16" if bf16 else "without bf16"
        found.ok(f"CPU, {threads} of {os.cpu_count()} threads a rank, {kind} in hardware")
    if not bf16 and (keys := keys_of_bf16(config)):
        found.warn(
            f"{', '.join(keys)}: bf16, which {name} does not multiply in hardware: ten times "
            "slower than fp32, or more",
            advice,
        )
    for refusal in (compile_refusal(config, device), fusing_refusal(config, device)):
        if refusal is not None:
            found.fail(*refusal)
    return found


def keys_of_bf16(config: TrainConfig) -> list[str]:
    """Keys of the yaml that insist on bf16, whatever the device."""
    wanted = {
        "vision_tower.dtype": config.vision_tower.dtype == "bf16",
        "language_model.dtype": config.language_model.dtype == "bf16",
        "precision": config.precision == "amp_bf16",
    }
    return [key for key, is_wanted in wanted.items() if is_wanted]


def check_memory(config: TrainConfig, device: str) -> Findings:
    """Estimate a rank's memory as `plan` does, and compare it with what the device has free.

    The model is built without weights; a micro-batch goes through it on fake tensors, as on a GPU:
    some seconds for the full recipe.
    """
    found = Findings()
    if config.parallelism == "auto":
        return found  # it could not be decided, which is told
    with found.failing():
        try:
            parts = _memory_parts(config, device)
        except InconclusiveError as error:
            found.warn(*str(error).split("; "))
            return found
        free = free_memory(device)
        total, activations = parts.pop("total"), parts["activations"]
        largest = ", ".join(
            f"{name.replace('_', ' ')} {readable(size)}" for name, size in parts.items() if size
        )
        text = f"a rank takes about {readable(total)} ({largest}) and {readable(free)} are free"
        advice = (
            "set device_train_microbatch_size lower, parallelism: shard over more ranks, or use "
            "a device with more memory"
        )
        if total - activations > free:
            found.fail(text, advice)
        elif total > (1 - FREE_SHARE) * free:
            found.warn(text, advice)
        else:
            found.ok(text)
    return found


def _memory_parts(config: TrainConfig, device: str) -> dict[str, float]:
    """Bytes of a rank by part, with `total`."""
    return memory_of_a_rank(
        *weights_and_activations(config, device),
        shards=ranks_of_a_copy(config),
        world_size=dist.get_world_size(),
    )


def free_memory(device: str) -> float:
    """Bytes that a rank may take: of its GPU, or its share of this machine's."""
    if device == "gpu":
        return torch.cuda.mem_get_info(dist.get_local_rank())[0]
    free = min(psutil.virtual_memory().available, _container_memory())
    return free / dist.get_local_world_size()


def _container_memory(group: Path = CONTROL_GROUP) -> float:
    """Bytes that a container's limit leaves (cgroup v2); infinite where there is none."""
    limit = container_limit(group)
    if limit == float("inf"):
        return limit
    used = int((group / "memory.current").read_text())
    cached = re.search(r"^inactive_file ([0-9]+)$", (group / "memory.stat").read_text(), re.M)
    return limit - used + (int(cached[1]) if cached else 0)
