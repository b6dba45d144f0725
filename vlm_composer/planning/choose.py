"""`parallelism: auto`: what the plan recommends for the devices that a run has."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from composer.utils import dist

from vlm_composer.assembly import assemble_model, unloaded
from vlm_composer.config import TrainConfig
from vlm_composer.config.run import Parallelism
from vlm_composer.planning.activations import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    ActivationBytes,
    measure_activations,
)
from vlm_composer.planning.estimate import Room, Weights, recommend
from vlm_composer.planning.on_gpus import microbatch_size
from vlm_composer.ranks import on_rank_zero
from vlm_composer.training.hardware import choose_precision, device_memory

log = logging.getLogger(__name__)


def choose_parallelism(config: TrainConfig, device: str) -> TrainConfig:
    """Decide `parallelism: auto`; all ranks must call this. Seconds, for nothing is loaded.

    Args:
        config: The run.
        device: "cpu" or "gpu".

    Returns:
        The run with what was chosen, and without `cache_prompts` where that cannot be had; any
        other `parallelism` stays.

    Raises:
        ValueError: Nothing fits into the devices' memory.
    """
    if config.parallelism != "auto":
        return config
    chosen, reason = on_rank_zero(lambda: _recommend(config, device))
    log.info("parallelism: auto is %s: %s.", chosen, reason)
    if config.cache_prompts and chosen != "replicate":
        log.warning("cache_prompts: does not work with parallelism: %s; it is off.", chosen)
        config = replace(config, cache_prompts=False)
    settings = config.fsdp_config if chosen != "replicate" else None
    return replace(config, parallelism=chosen, fsdp_config=settings)


def weights_and_activations(config: TrainConfig, device: str) -> tuple[Weights, ActivationBytes]:
    """Count the model's weights and measure a micro-batch; seconds for the full recipe.

    Args:
        config: The run.
        device: "cpu" or "gpu".
    """
    ranks = dist.get_world_size()
    with torch.device("meta"):
        model = assemble_model(unloaded(config), device)
    weights = Weights.of(model)  # before they are faked
    precision, autocast_dtype = choose_precision(config.precision, device)
    if precision.value == "amp_bf16":  # Composer's, on a GPU
        autocast_dtype = torch.bfloat16
    activations = measure_activations(
        model,
        microbatch_size=min(
            microbatch_size(config, ranks), config.global_train_batch_size // ranks
        ),
        prompt_tokens=PROMPT_TOKENS,
        answer_tokens=ANSWER_TOKENS,
        autocast_dtype=autocast_dtype,
    )
    return weights, activations


def _recommend(config: TrainConfig, device: str) -> tuple[Parallelism, str]:
    memory, name = device_memory(device)
    room = Room(memory, name, dist.get_world_size(), dist.get_local_world_size())
    chosen, reason = recommend(*weights_and_activations(config, device), room)
    if chosen is None:
        raise ValueError(f"parallelism: auto: {reason}")
    return chosen, reason
