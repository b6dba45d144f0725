"""Memory, communication and time of a run on N GPUs: arithmetic on what is counted or measured.

Everything here is computed, nothing was run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm_composer.config.run import Parallelism
from vlm_composer.models.flops import TrainingFlops
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.planning.activations import ActivationBytes
from vlm_composer.planning.devices import Device

FREE_SHARE = 0.1
"""Share of a device's memory that is left to CUDA's context, NCCL, cuBLAS and fragmentation."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parts.

    Attributes:
        towers: Both frozen towers, as stored.
        backward: What of the towers a sharded backward gathers again: the language model without
            its embedding table. The vision tower has no backward.
        connector: Trained weights in fp32; gradients are as many, AdamW's moments twice as many.
        largest_units: The two largest units that sharding gathers whole, one in use and one fetched
            ahead.
        tied: The embedding table is the head, and `parallelism: shard` is refused.
    """

    towers: int
    backward: int
    connector: int
    largest_units: int
    tied: bool = False

    @classmethod
    def of(cls, model: VisionLanguageModel) -> Weights:
        """Count a model's, on the meta device or any other."""
        llm = model.language_model.model
        embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
        tables = {id(m.weight): _bytes(m) for m in (embedding, head)}
        layers = [_bytes(layer) for layer in getattr(model.language_model.decoder, "layers", [])]
        units = [*tables.values(), *layers, _bytes(model.connector)]
        return cls(
            towers=_bytes(model.vision_tower) + _bytes(llm),
            backward=_bytes(llm) - _bytes(embedding),
            connector=_bytes(model.connector),
            largest_units=sum(sorted(units)[-2:]),
            tied=embedding.weight is head.weight,
        )


@dataclass(frozen=True)
class Cluster:
    """N GPUs of a kind.

    Attributes:
        device: The kind.
        gpus: How many (N).
        gpus_per_node: Of them in a node (M).
        mfu: Share of the peak that the arithmetic is assumed to reach.
    """

    device: Device
    gpus: int
    gpus_per_node: int
    mfu: float

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus_per_node < 1:
            raise ValueError(
                f"--gpus {self.gpus} --gpus-per-node {self.gpus_per_node}: both must be 1 or more"
            )
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"--gpus {self.gpus} is not a number of whole nodes of {self.gpus_per_node} "
                "(--gpus-per-node)"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu {self.mfu}: must be more than 0 and at most 1")

    @property
    def node_size(self) -> int:
        """GPUs of a node that are used."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        """Nodes that are used."""
        return self.gpus // self.node_size

    @property
    def link(self) -> float:
        """Bytes/s at which a GPU takes part in a ring over all of them.

        Rings over several nodes pass each node's border on all of its cards together.
        """
        if self.nodes == 1:
            return self.device.intra_node
        return min(self.device.intra_node, self.device.inter_node * self.gpus_per_node)

    def shards(self, parallelism: str) -> int:
        """Ranks that hold one copy of the model between them."""
        return {"replicate": 1, "shard": self.gpus, "hybrid": self.node_size}[parallelism]


def memory_of_a_rank(
    weights: Weights, activations: ActivationBytes, *, shards: int, world_size: int
) -> dict[str, float]:
    """Bytes of a rank by part, with `total`.

    Args:
        weights: Of the model.
        activations: Of a micro-batch; their peak is what counts.
        shards: Ranks that hold one copy of the model between them.
        world_size: All ranks.
    """
    parts = {
        "towers": weights.towers / shards,
        "gathered_units": float(weights.largest_units if shards > 1 else 0),
        "connector": weights.connector / shards,
        "gradients": weights.connector / shards,
        # torch's DDP copies gradients into buckets before it sends them.
        "gradient_buckets": float(weights.connector if shards == 1 and world_size > 1 else 0),
        "adamw_moments": 2 * weights.connector / shards,
        "activations": float(activations.peak),
    }
    return {**parts, "total": sum(parts.values())}


def communication_of_a_step(
    weights: Weights, cluster: Cluster, accumulation: int, parallelism: str
) -> dict[str, float]:
    """Bytes that a rank receives in an optimizer step, and the seconds they take alone.

    Args:
        weights: Of the model.
        cluster: The ranks and their links.
        accumulation: Micro-batches of a step on a rank.
        parallelism: replicate: one all-reduce of the connector's gradients. shard: in each
            micro-batch an all-gather of all weights, one more of what has a backward, and a
            reduce-scatter of the gradients. hybrid: the same within the node, and an all-reduce of
            each rank's part of the gradients with its fellows on the other nodes.

    Returns:
        `bytes`, those of them `bytes_between_nodes` (on one card, for hybrid), and `seconds`.
    """
    shards = cluster.shards(parallelism)
    gathered = weights.towers + weights.backward + 2 * weights.connector
    sharded = accumulation * (gathered + weights.connector) * _others(shards)
    if parallelism == "shard":
        across = sharded if cluster.nodes > 1 else 0.0
        return {"bytes": sharded, "bytes_between_nodes": across, "seconds": sharded / cluster.link}
    # An all-reduce is a reduce-scatter and an all-gather.
    if parallelism == "replicate":
        sent = 2 * weights.connector * _others(cluster.gpus)
        across = sent if cluster.nodes > 1 else 0.0
        return {"bytes": sent, "bytes_between_nodes": across, "seconds": sent / cluster.link}
    across = accumulation * 2 * weights.connector / shards * _others(cluster.nodes)
    return {
        "bytes": sharded + across,
        "bytes_between_nodes": across,
        "seconds": sharded / cluster.device.intra_node + across / cluster.device.inter_node,
    }


def speed(
    weights: Weights,
    flops: TrainingFlops,
    cluster: Cluster,
    *,
    global_batch: int,
    microbatch: int,
    samples: int,
    parallelism: str,
) -> dict[str, Any]:
    """Time of a step and of an epoch.

    A micro-batch takes its operations at the stated MFU, and no less than reading the weights from
    the device's memory takes. Gathering of shards overlaps with that; the all-reduce of `replicate`
    is added, as if nothing hid it. The loader is taken to keep up.

    Args:
        weights: Of the model.
        flops: Of one sample.
        cluster: The ranks.
        global_batch: Samples of a step.
        microbatch: Samples of a forward pass on a rank.
        samples: Of an epoch.
        parallelism: "replicate", "hybrid" or "shard".

    Returns:
        `seconds_per_step`, `samples_per_second`, `hours_per_epoch`, `communication`, and the images
        that loaders must make: `images_per_second_per_gpu` and `…_per_node`.
    """
    accumulation = global_batch // (cluster.gpus * microbatch)
    arithmetic = microbatch * flops.total / (cluster.mfu * cluster.device.peak_flops)
    reading = (weights.towers + weights.backward) / cluster.device.memory_bandwidth
    computing = accumulation * max(arithmetic, reading)
    communication = communication_of_a_step(weights, cluster, accumulation, parallelism)
    waiting = communication["seconds"]
    seconds = computing + waiting if parallelism == "replicate" else max(computing, waiting)
    rate = global_batch / seconds
    return {
        "seconds_per_step": seconds,
        "limited_by": (
            "gathering weights"
            if parallelism != "replicate" and waiting > computing
            else "reading weights from memory"
            if reading > arithmetic
            else "arithmetic"
        ),
        "samples_per_second": rate,
        "hours_per_epoch": samples / rate / 3600,
        "images_per_second_per_gpu": rate / cluster.gpus,
        "images_per_second_per_node": rate / cluster.gpus * cluster.node_size,
        "communication": communication,
    }


@dataclass(frozen=True)
class Room:
    """Where a run is to fit: its ranks and what each of them has.

    Attributes:
        memory: Bytes of a rank's device.
        device: What it is called.
        world_size: All ranks.
        node_size: Ranks of a node.
    """

    memory: float
    device: str
    world_size: int
    node_size: int

    @classmethod
    def of(cls, cluster: Cluster) -> Room:
        """The room that a cluster gives."""
        device = cluster.device
        return cls(device.memory, device.name, cluster.gpus, cluster.node_size)

    @property
    def usable(self) -> float:
        """Bytes that may be planned with."""
        return (1 - FREE_SHARE) * self.memory


def recommend(
    weights: Weights, activations: ActivationBytes, room: Room
) -> tuple[Parallelism | None, str]:
    """Choose `parallelism`, with the reason in a sentence; None where nothing fits.

    The fewer ranks share a copy the less is sent: replicate before hybrid before shard.
    """
    world_size, node_size = room.world_size, room.node_size
    totals = {
        shards: memory_of_a_rank(weights, activations, shards=shards, world_size=world_size)[
            "total"
        ]
        for shards in (1, node_size, world_size)
    }
    text = f"{_gib(room.usable)} GiB of {room.device} memory less a margin of {FREE_SHARE:.0%}"
    whole = _gib(totals[1])
    if totals[1] <= room.usable:
        return "replicate", (
            f"a rank's {whole} GiB fit into the {text}, and only the connector's gradients are sent"
        )
    fitting = [shards for shards in (node_size, world_size) if totals[shards] <= room.usable]
    if fitting and weights.tied:
        return None, (
            f"a whole copy takes {whole} GiB, more than the {text}, and a language model whose "
            "table is its head is not sharded; use a smaller micro-batch"
        )
    too_much = f"a whole copy takes {whole} GiB, more than the {text}"
    if fitting and 1 < fitting[0] < world_size:
        return "hybrid", (
            f"{too_much}; a shard of the {node_size} ranks of a node takes "
            f"{_gib(totals[node_size])}, and weights are gathered within the node"
        )
    if fitting:
        return "shard", f"{too_much}; a shard of {world_size} takes {_gib(totals[world_size])}"
    if world_size == 1:
        return None, (
            f"a whole copy ({whole} GiB) does not fit into the {text}; use a smaller micro-batch "
            "or more ranks"
        )
    return None, (
        f"neither a whole copy ({whole} GiB) nor a shard of {world_size} "
        f"({_gib(totals[world_size])} GiB) fits into the {text}; use a smaller micro-batch or more "
        "ranks"
    )


def _others(ranks: int) -> float:
    """Share of a tensor that a ring brings from the other ranks, (N - 1) / N."""
    return (ranks - 1) / ranks


def _bytes(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
