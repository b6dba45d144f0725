"""Whether code is, letter for letter, code that is known."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def same_code(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions have the same source.

    transformers copies its blocks from model to model. What replaces a block asks for its code and
    not for its name, so that a model or a version that computes something else keeps its own.
    """
    return inspect.getsource(one) == inspect.getsource(other)
