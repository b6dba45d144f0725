"""How blocks of a frozen model are replaced in place: by what code they have, under their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def same_code(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions have the same source.

    transformers copies its blocks from model to model. What replaces a block asks for its code and
    not for its name, so that a model or a version that computes something else keeps its own.
    """
    return inspect.getsource(one) == inspect.getsource(other)


class StandInLinear(nn.Linear):
    """A linear layer with the parameters of another, for a forward of its own.

    Args:
        linear: Whose parameters it takes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
