"""The window in which files, images and samples are read ahead of the one that is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(
    executor: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Generator[R, None, None]:
    """Yield `function` of each item, in order.

    Args:
        executor: Computes it.
        function: What it raises is raised in its item's place.
        items: Taken as they are needed.
        ahead: Items that are computed or waiting to be used beside the one that is yielded.
    """
    window: deque[Future[R]] = deque()
    try:
        for item in items:
            window.append(executor.submit(function, item))
            if len(window) > ahead:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        for future in window:
            future.cancel()
