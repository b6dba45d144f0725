"""Ranks that fail together: what one of them finds wrong, all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from composer.utils import dist

T = TypeVar("T")


def run_on(chosen: bool, action: Callable[[], T]) -> T | None:
    """Run `action` on the chosen ranks; all ranks must call this.

    A rank that raised alone would leave the others waiting for it in their next collective call.

    Args:
        chosen: Whether this rank is to run it.
        action: May raise ValueError or OSError.

    Returns:
        What it returned here; None on the other ranks.

    Raises:
        ValueError: It did on some rank.
        OSError: It did on some rank.
    """
    result, error = None, None
    if chosen:
        try:
            result = action()
        except (ValueError, OSError) as caught:
            error = caught
    errors = dist.all_gather_object(error)
    if error is not None:
        raise error
    for other in errors:
        if other is not None:
            raise other
    return result


def on_every_rank(action: Callable[[], T]) -> T:
    """Run `action` on all ranks, each for itself, and fail on all where it fails on one.

    Raises:
        ValueError: It did on some rank.
        OSError: It did on some rank.
    """
    result: T = run_on(True, action)  # type: ignore[assignment]
    return result


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give every rank what it returned (which must be picklable).

    Raises:
        ValueError: It did on rank 0.
        OSError: It did on rank 0.
    """
    results = [run_on(dist.get_global_rank() == 0, action)]
    dist.broadcast_object_list(results, src=0)
    result: T = results[0]  # type: ignore[assignment]
    return result
