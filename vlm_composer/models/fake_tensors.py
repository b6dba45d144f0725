"""Models on fake tensors (torch's `FakeTensorMode`), which have shapes and no contents."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

NEED_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)
"""What is raised where code looks at the contents of fake tensors, as where experts are chosen."""


def fake_weights(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters, buffers and constants on the meta device by fake tensors on the "cpu";
    tied ones stay tied."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            with torch.no_grad():
                shape = tensor.detach().to("meta")
            standing = FakeTensor(mode, shape, torch.device("cpu"))
            made[id(tensor)] = (
                nn.Parameter(standing, tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else standing
            )
        return made[id(tensor)]

    replaced: list[Tensor] = []  # kept until the end, for ids must not be used twice
    for module in model.modules():
        constants = {k: v for k, v in vars(module).items() if isinstance(v, Tensor) and v.is_meta}
        tensors: dict[str, Any]
        for tensors in (module._parameters, module._buffers, constants):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    replaced.append(tensor)
                    tensors[name] = fake(tensor)
        vars(module).update(constants)


def runs_on_fakes(mode: FakeTensorMode, run: Callable[[], Any]) -> bool:
    """Run something on fake tensors; return False where it needs their contents."""
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    before, torchs.disabled = torchs.disabled, True  # it prints the trace of what is raised
    try:
        with mode:
            run()
    except NEED_NUMBERS:
        return False
    finally:
        torchs.disabled = before
    return True


class _Operations(TorchDispatchMode):
    """Counts operations on floating-point numbers by name, but for those that only move them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a condition, on numbers that fake tensors lack: either way will do
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        is_one = len(args) == 2 and not isinstance(args[1], Tensor) and args[1] == 1
        if (
            isinstance(result, Tensor)
            and result.is_floating_point()
            and not (func.is_view or is_one or name in _MOVES)
        ):
            self.counts[name] += 1
        return result


_MOVES = {"clone", "_to_copy", "_unsafe_view", "copy_", "index", "cat", "detach"}


def operations(run: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """Run something; return what it returns and the operations that compute, by name."""
    with _Operations() as operations:
        result = run()
    return result, operations.counts
