"""Linear and GELU in one oneDNN kernel, for the vision tower on a CPU.

On a CPU torch's GELU of a bf16 tensor takes about as long as the linear layer before it; oneDNN
applies it while it writes the product. On a GPU there is nothing to gain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, PytorchGELUTanh
from transformers.models.siglip.modeling_siglip import SiglipMLP

from vlm_composer.models.replacing import StandInLinear, same_code


class GELULinear(StandInLinear):
    """`gelu(linear(x))` on a CPU, without gradient.

    Keeps a copy of its weight in oneDNN's own layout, made at the first call and whenever the
    weight has changed.

    Args:
        linear: Whose parameters it takes.
        approximate: "tanh" or "none", as `torch.nn.functional.gelu`.
    """

    def __init__(self, linear: nn.Linear, approximate: str) -> None:
        super().__init__(linear)
        self.approximate = approximate
        self._packed = torch.empty(0)
        self._packed_from: tuple[int, int] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features)."""
        weight = self.weight.detach()
        if self._packed_from != (weight.data_ptr(), self.weight._version):
            self._packed_from = weight.data_ptr(), self.weight._version
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, input[..., 0].numel())
        return torch.ops.mkldnn._linear_pointwise(
            input, self._packed, self.bias, "gelu", [], self.approximate
        )


def fuse_gelu(model: nn.Module) -> int:
    """Replace `fc1` and the activation of feed-forwards whose code is, letter for letter, SigLIP's.

    Args:
        model: A frozen vision model on a CPU whose weights are not sharded.

    Returns:
        How many were replaced.
    """
    count = 0
    module: Any
    for module in model.modules():
        if not same_code(type(module).forward, SiglipMLP.forward):
            continue
        if (approximate := _approximation(module.activation_fn)) is None:
            continue
        module.fc1 = GELULinear(module.fc1, approximate)
        module.activation_fn = nn.Identity()
        count += 1
    return count


def _approximation(activation: nn.Module) -> str | None:
    if isinstance(activation, PytorchGELUTanh):
        return "tanh"
    if isinstance(activation, GELUActivation | nn.GELU):
        return "none"
    return None
