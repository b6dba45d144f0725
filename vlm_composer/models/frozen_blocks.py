"""Faster norms, rotary embeddings and feed-forwards for a frozen decoder.

Between a decoder's matrix products stand small operations. torch runs each as a kernel of its own
and keeps their intermediates, mostly in fp32, for gradients of weights that are frozen. Here a
norm, a rotation and a gated feed-forward are each one compiled kernel forward and one backward,
that keep what the gradient of their input needs. As Liger Kernel does, modules are replaced in
place: names, weights and the decoder's own code stay. Without compilation these functions are
slower than what they replace, so that there is no such form of them.

Shape suffixes: N tokens, D width, F width of the feed-forward, H heads, C width of a head.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import setuptools  # noqa: F401  (for torch's compiler, which could not import it behind pip)
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama as llama

from vlm_composer.models.replacing import same_code

P = ParamSpec("P")
R = TypeVar("R")

# Itself, before an architecture's is replaced.
_plain_rotation = llama.apply_rotary_pos_emb


def compile_blocks(model: nn.Module) -> list[str]:
    """Replace the blocks of a frozen decoder that are known here.

    A block is known where its code is, letter for letter, Llama's, from which transformers copies
    it to most other architectures. The rotary embedding is replaced for the whole architecture.

    Args:
        model: A Hugging Face causal language model; it must stay frozen.

    Returns:
        Names of what was replaced, with how often.
    """
    # torch 2.7 writes the number of threads into a CPU's kernel but not into its cache's key: ranks
    # of one thread each took the kernels of a run with two, and waited for each other's cores.
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    counts: dict[str, int] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (block := _replacement(child)) is not None:
                setattr(parent, name, block)
                label = f"{type(child).__name__} → {type(block).__name__}"
                counts[label] = counts.get(label, 0) + 1
    module: Any = sys.modules[type(model).__module__]
    rotary = getattr(module, "apply_rotary_pos_emb", None)
    if rotary is not None and same_code(rotary, _plain_rotation):
        module.apply_rotary_pos_emb = rotate_heads
        counts["apply_rotary_pos_emb → rotate_heads"] = 1
    return [f"{count} × {label}" for label, count in counts.items()]


_eager = False
"""Whether kernels are run as they are written."""


@contextmanager
def eagerly() -> Iterator[None]:
    """Run the kernels of this module without compiling them: slower, with the same results."""
    global _eager
    before, _eager = _eager, True
    try:
        yield
    finally:
        _eager = before


@contextmanager
def blocks_for_a_check(model: nn.Module) -> Iterator[list[str]]:
    """Do what `compile_blocks` does to a copy of a model, and leave its architecture as it was."""
    module: Any = sys.modules[type(model).__module__]
    rotary = getattr(module, "apply_rotary_pos_emb", None)
    try:
        yield compile_blocks(model)
    finally:
        if rotary is not None:
            module.apply_rotary_pos_emb = rotary


def _replacement(module: nn.Module) -> nn.Module | None:
    forward = type(module).forward
    if same_code(forward, llama.LlamaRMSNorm.forward):
        return FrozenRMSNorm(module)
    if same_code(forward, llama.LlamaMLP.forward) and isinstance(module.act_fn, nn.SiLU):
        return FrozenSwiGLU(module)
    return None


class FrozenRMSNorm(nn.Module):
    """RMSNorm whose weight takes no gradient, as `LlamaRMSNorm`.

    Args:
        norm: The module whose weight and epsilon it takes.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension of (…, D)."""
        rows_ND = hidden.reshape(-1, hidden.shape[-1])
        return _RMSNorm.apply(rows_ND, self.weight, self.variance_epsilon).view(hidden.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        normed_ND, inverse_rms_N1 = _norm(_any_length(hidden_ND), weight_D, epsilon)
        ctx.save_for_backward(hidden_ND, weight_D, inverse_rms_N1)
        return normed_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:
        hidden_ND, weight_D, inverse_rms_N1 = ctx.saved_tensors
        gradient_ND, hidden_ND = _any_length(gradient_ND), _any_length(hidden_ND)
        inverse_rms_N1 = _any_length(inverse_rms_N1)
        return _norm_backward(gradient_ND, hidden_ND, inverse_rms_N1, weight_D), None, None


class FrozenSwiGLU(nn.Module):
    """Gated feed-forward `down(silu(gate(x)) · up(x))` with frozen weights, as `LlamaMLP`.

    Args:
        mlp: The module whose linear layers it takes.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        return self.down_proj(_SwiGLU.apply(self.gate_proj(hidden), self.up_proj(hidden)))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(_rows(gate), _rows(up)).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        by_gate, by_up = _gated_backward(_rows(gradient), _rows(gate), _rows(up))
        return by_gate.view(gate.shape), by_up.view(up.shape)


def rotate_heads(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys, as transformers' `apply_rotary_pos_emb`.

    Args:
        q: (1, H, N, C).
        k: (1, heads of keys, N, C).
        cos: (1, N, C); it takes no gradient.
        sin: (1, N, C); it takes no gradient.
        position_ids: Unused.
        unsqueeze_dim: Dimension of the heads.

    Returns:
        Both rotated.
    """
    del position_ids
    if q.shape[0] != 1 or unsqueeze_dim != 1:  # generation of several captions
        return _plain_rotation(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads_1HNC: Tensor, cos_1NC: Tensor, sin_1NC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_1NC, sin_1NC)
        return _along_tokens(_rotated, heads_1HNC, cos_1NC, sin_1NC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1HNC: Tensor) -> tuple[Tensor, None, None]:
        return _along_tokens(_rotated_back, gradient_1HNC, *ctx.saved_tensors), None, None


def _along_tokens(
    kernel: Callable[..., Tensor], heads_1HNC: Tensor, cos_1NC: Tensor, sin_1NC: Tensor
) -> Tensor:
    """Call a kernel on (N, H, C), which is how projections lay heads out."""
    heads_NHC = _any_length(heads_1HNC[0].transpose(0, 1).contiguous())
    rotated_NHC = kernel(heads_NHC, _any_length(cos_1NC[0]), _any_length(sin_1NC[0]))
    return rotated_NHC.transpose(0, 1)[None]


def _rows(tensor: Tensor) -> Tensor:
    return _any_length(tensor.reshape(-1, tensor.shape[-1]))


def _any_length(rows: Tensor) -> Tensor:
    """Have one kernel compiled for any number of rows.

    Detached, for torch 2.7 would compile anew for each shape of what `rows` is a view of.
    """
    rows = rows.detach()
    if _eager:
        return rows
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    return rows


def _compiled_when_called(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compile` at the first call, for it imports the compiler: seconds of every start.

    On a CPU the processes that it starts meanwhile, which compile for Triton alone, are left out.
    """
    kernel: Callable[P, R] | None = None

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        nonlocal kernel
        if _eager:
            return function(*arguments, **options)
        if kernel is None:
            tensor: Any = arguments[0]
            if tensor.device.type == "cpu":
                os.environ.setdefault("TORCH_WARM_POOL", "0")
            kernel = torch.compile(function)
        return kernel(*arguments, **options)

    return call


@_compiled_when_called
def _norm(hidden_ND: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    exact_ND = hidden_ND.float()
    inverse_rms_N1 = torch.rsqrt(exact_ND.square().mean(-1, keepdim=True) + epsilon)
    return weight_D * (exact_ND * inverse_rms_N1).to(hidden_ND.dtype), inverse_rms_N1


@_compiled_when_called
def _norm_backward(
    gradient_ND: Tensor, hidden_ND: Tensor, inverse_rms_N1: Tensor, weight_D: Tensor
) -> Tensor:
    normed_ND = hidden_ND.float() * inverse_rms_N1
    weighted_ND = gradient_ND.float() * weight_D.float()
    along_N1 = (weighted_ND * normed_ND).mean(-1, keepdim=True)
    return (inverse_rms_N1 * (weighted_ND - normed_ND * along_N1)).to(hidden_ND.dtype)


@_compiled_when_called
def _gated(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    return nn.functional.silu(gate_NF) * up_NF


@_compiled_when_called
def _gated_backward(gradient_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    gradient, gate, up = gradient_NF.float(), gate_NF.float(), up_NF.float()
    sigmoid = torch.sigmoid(gate)
    by_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return by_gate.to(gate_NF.dtype), (gradient * gate * sigmoid).to(up_NF.dtype)


@_compiled_when_called
def _rotated(heads_NHC: Tensor, cos_NC: Tensor, sin_NC: Tensor) -> Tensor:
    first, second = heads_NHC.chunk(2, dim=-1)
    return heads_NHC * cos_NC[:, None] + torch.cat([-second, first], dim=-1) * sin_NC[:, None]


@_compiled_when_called
def _rotated_back(gradient_NHC: Tensor, cos_NC: Tensor, sin_NC: Tensor) -> Tensor:
    first, second = (gradient_NHC * sin_NC[:, None]).chunk(2, dim=-1)
    return gradient_NHC * cos_NC[:, None] + torch.cat([second, -first], dim=-1)
