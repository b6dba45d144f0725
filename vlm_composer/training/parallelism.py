"""How ranks share the model, from outside: towers read once and sent, DDP's order, FSDP2's mesh."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from composer import Algorithm, Event, Logger, State
from composer.utils import FSDP2Config, ParallelismConfig, dist
from torch import nn
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from vlm_composer.config import TrainConfig
from vlm_composer.config.run import FSDPConfig
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.ranks import on_every_rank, on_rank_zero


def assemble_on_first_rank(
    assemble: Callable[[bool], VisionLanguageModel], parallelism: str, device: str
) -> VisionLanguageModel:
    """Let rank 0 read the towers, and make room for them on the others; all ranks call this.

    The Trainer sends rank 0's weights to all: DDP when it wraps the model, Composer when FSDP2 has
    sharded it, so that no rank but the first ever has a whole copy in the second case.

    Args:
        assemble: Builds the model; True leaves the towers empty, on the meta device.
        parallelism: "replicate", "shard" or "hybrid".
        device: "cpu" or "gpu".

    Returns:
        The model. But for rank 0, its towers are uninitialised with `replicate` and on the meta
        device with the other kinds.

    Raises:
        ValueError: A tower cannot be used, on some rank.
        OSError: It cannot be read.
    """
    vlm = on_every_rank(lambda: assemble(dist.get_global_rank() > 0))
    levers = on_rank_zero(lambda: vlm.language_model.levers)  # it has the weights to check
    if vlm.language_model.levers is None:
        assert levers is not None
        vlm.language_model.install(levers)
    if parallelism == "replicate":
        _allocate(vlm, "cuda" if device == "gpu" else "cpu")
    return vlm


def _allocate(model: nn.Module, device: str) -> None:
    """Replace parameters on the meta device by uninitialised ones; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            if parameter not in made:
                empty = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(empty, parameter.requires_grad)
            setattr(module, name, made[parameter])


class FixedBuckets(Algorithm):
    """Keeps DDP from laying its buckets out anew after the first batch; does nothing else.

    The layout decides in which order an all-reduce over more than two ranks adds up. With another
    one in the first batch after every start, a resumed run would not have the bits of one that was
    never interrupted. DDP keeps its layout where it looks for unused parameters, which costs a walk
    over the graph; Composer does so for an algorithm that says it needs it.
    """

    def __init__(self) -> None:
        # There never are any, which DDP warns of.
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")

    @property
    def find_unused_parameters(self) -> bool:
        return True

    def match(self, event: Event, state: State) -> bool:
        del event, state
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        raise AssertionError("it matches no event")


def ranks_of_a_copy(config: TrainConfig) -> int:
    """Ranks that hold one copy of the model between them; `auto` must have been decided."""
    if config.parallelism == "shard":
        return dist.get_world_size()
    if config.parallelism == "hybrid":
        return config.shard_degree or dist.get_local_world_size()
    return 1


def device_mesh(config: TrainConfig, device: str) -> DeviceMesh | None:
    """Arrange the ranks as (replicate, shard) for FSDP2; None for `parallelism: replicate`.

    Args:
        config: The run.
        device: "cpu" or "gpu".

    Raises:
        ValueError: The ranks that share a copy do not divide all ranks.
    """
    if config.parallelism == "replicate":
        return None
    world_size, shards = dist.get_world_size(), ranks_of_a_copy(config)
    if world_size % shards:
        raise ValueError(
            f"parallelism: hybrid: {shards} ranks that share a copy do not divide the "
            f"{world_size} ranks; set fsdp_config.data_parallel_shard_degree"
        )
    kind = "cuda" if device == "gpu" else "cpu"
    shape = (world_size // shards, shards)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


@dataclass
class FSDP2OnMesh(FSDP2Config):
    """An FSDP2Config that keeps its mesh: Composer 0.32.1's State gives it one of all ranks."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "device_mesh" or self.device_mesh is None:
            super().__setattr__(name, value)


def fsdp_config(config: FSDPConfig, mesh: DeviceMesh) -> ParallelismConfig:
    """Composer's configuration of FSDP2 over the mesh's "shard" dimension.

    What is replicated is `average_gradients`' to keep equal: FSDP2's own way of that needs a
    collective that gloo does not have, so that it could not be tested here.
    """
    return ParallelismConfig(
        fsdp2=FSDP2OnMesh(
            device_mesh=mesh["shard"],
            reshard_after_forward=config.reshard_after_forward,
            activation_checkpointing=config.activation_checkpointing,
            verbose=config.verbose,
        )
    )


def choose_units(model: VisionLanguageModel) -> None:
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
            "only parallelism: replicate works with a language model whose embedding table is its "
            "head (tie_word_embeddings)"
        )
    vision_layers = {id(layer) for layer in _layers(model.vision_tower)}
    decoder_layers = {id(layer) for layer in _layers(model.language_model)}
    units = (
        vision_layers
        | decoder_layers
        | {id(m) for m in (model.connector, model.vision_tower, embedding, head)}
        | {id(model.language_model.decoder)}
    )
    hooks: Any = model
    hooks.fsdp_wrap_fn = lambda module: id(module) in units
    hooks.activation_checkpointing_fn = lambda module: id(module) in decoder_layers


def _layers(tower: VisionTower | LanguageModel) -> list[nn.Module]:
    depth = tower.model.config.num_hidden_layers
    stacks = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return [layer for stack in stacks for layer in stack]


def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make FSDP2's gradients the average over all ranks, in every reduction.

    FSDP2 averages over the ranks that share a copy. Two things are left to do: average over the
    copies (`hybrid`), and divide where gloo returns the sum instead (its `reduce_scatter(AVG)`,
    pytorch#162338, torch 2.7). AdamW and norm clipping hide both from a loss curve.

    Args:
        model: Whose modules FSDP2 has wrapped.
        mesh: As `device_mesh` made it.
    """
    copies, shards = mesh.shape
    divisor = copies * (shards if torch.distributed.get_backend() == "gloo" else 1)
    group: ProcessGroup = mesh.get_group("replicate")

    def average(gradient: torch.Tensor) -> None:
        if copies > 1:
            torch.distributed.all_reduce(gradient, ReduceOp.SUM, group)
        gradient.div_(divisor)

    if divisor == 1:
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(average)
