"""Shared memory that streaming makes, freed before the process ends."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
from composer.utils import dist
from streaming.base.shared import SharedMemory


@contextlib.contextmanager
def released_shared_memory() -> Iterator[None]:
    """Free what shared memory is made meanwhile: streaming keeps it until the process ends."""
    made: list[SharedMemory] = []
    original = SharedMemory.__init__

    def remember(self: SharedMemory, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedMemory, "__init__", remember)
        yield
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.barrier()
    for block in made:
        atexit.unregister(block.cleanup)
        block.cleanup()
