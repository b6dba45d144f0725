"""What GPUs can do by their vendor's figures, written down from memory of the data sheets.

Nothing here was measured, nor looked up again: check a figure before you buy by it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU in a server as its vendor builds it.

    Attributes:
        name: Its key in `DEVICES`.
        memory: Bytes; a data sheet's GB is read as 10⁹, the lower reading.
        peak_flops: Dense bf16 FLOP/s, without sparsity.
        memory_bandwidth: Bytes/s of its own memory.
        intra_node: Bytes/s that a GPU sends to others of its node, one way.
        inter_node: Bytes/s that a GPU's network card sends, one card a GPU.
    """

    name: str
    memory: float
    peak_flops: float
    memory_bandwidth: float
    intra_node: float
    inter_node: float


# Memory, bf16 and memory bandwidth: NVIDIA's data sheets of each GPU (SXM forms; the data sheets of
# Hopper and Blackwell give bf16 with sparsity, which is halved here). NVLink: the data sheets give
# both directions together, halved here: 600 GB/s for A100, 900 for H100 and H200, 1,800 for B200;
# L40S and L4 have PCIe 4.0 x16, 64 GB/s both ways. Between nodes: one card a GPU, of 200 Gb/s in
# DGX A100 and of 400 Gb/s in DGX H100, H200 and B200; for L40S and L4, 50 Gb/s is assumed.
DEVICES = {
    device.name: device
    for device in (
        Device("b200", 180e9, 2250e12, 8.0e12, 900e9, 50e9),
        Device("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9),
        Device("h100", 80e9, 989e12, 3.35e12, 450e9, 50e9),
        Device("a100-80gb", 80e9, 312e12, 2.039e12, 300e9, 25e9),
        Device("a100-40gb", 40e9, 312e12, 1.555e12, 300e9, 25e9),
        Device("l40s", 48e9, 362e12, 0.864e12, 32e9, 6.25e9),
        Device("l4", 24e9, 121e12, 0.3e12, 32e9, 6.25e9),
    )
}
"""GPUs that a plan can be made for, by name."""


def find_device(name: str) -> Device:
    """Look a GPU up.

    Raises:
        ValueError: It is not in the table.
    """
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise ValueError(f"--device {name}: unknown; choose from {', '.join(DEVICES)}") from None
