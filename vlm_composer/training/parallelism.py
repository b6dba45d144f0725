"""FSDP2, applied to the model from outside."""

from __future__ import annotations

from typing import Any

import torch
from composer.utils import FSDP2Config, ParallelismConfig, dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from vlm_composer.config.run import FSDPConfig
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.models.vlm import VisionLanguageModel


def shard_config(config: FSDPConfig) -> ParallelismConfig:
    """Composer's configuration of FSDP2 over all ranks."""
    return ParallelismConfig(
        fsdp2=FSDP2Config(
            reshard_after_forward=config.reshard_after_forward,
            activation_checkpointing=config.activation_checkpointing,
            verbose=config.verbose,
        )
    )


def choose_shards(model: VisionLanguageModel) -> None:
    """Say which modules are gathered as a unit: the connector, the towers, the embedding, each
    layer.

    Composer asks the attributes set here. The connector (fp32) must be apart from the towers
    (bf16), and the embedding table, which is called before the decoder, apart from it.

    Raises:
        ValueError: The language model's table is tied to its head; FSDP2 cannot shard it apart.
    """
    llm = model.language_model.model
    embedding = llm.get_input_embeddings()
    head = llm.get_output_embeddings()
    if embedding.weight is head.weight:
        raise ValueError(
            "parallelism: shard does not work with a language model whose embedding table is its "
            "head (tie_word_embeddings); use parallelism: replicate"
        )
    vision_layers = {id(layer) for layer in _layers(model.vision_tower)}
    decoder_layers = {id(layer) for layer in _layers(model.language_model)}
    units = (
        vision_layers
        | decoder_layers
        | {id(m) for m in (model.connector, model.vision_tower, llm.base_model, embedding, head)}
    )
    hooks: Any = model
    hooks.fsdp_wrap_fn = lambda module: id(module) in units
    hooks.activation_checkpointing_fn = lambda module: id(module) in decoder_layers


def _layers(tower: VisionTower | LanguageModel) -> list[nn.Module]:
    depth = tower.model.config.num_hidden_layers
    stacks = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return [layer for stack in stacks for layer in stack]


def mend_gloo_averages(model: nn.Module) -> None:
    """Divide FSDP2's gradients by the number of ranks where gloo leaves them summed.

    gloo's `reduce_scatter(AVG)` returns the sum (pytorch#162338, torch 2.7). AdamW and norm
    clipping hide it from a loss curve. Does nothing with NCCL or without FSDP2.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() != "gloo":
        return
    world_size = dist.get_world_size()

    def average(gradient: torch.Tensor) -> None:
        gradient.div_(world_size)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(average)
