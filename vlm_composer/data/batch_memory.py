"""Memory for batches that a loader's worker writes and the process that trains gives back.

torch puts every batch of a worker into new shared memory: the kernel zeroes it, both processes map
it page by page, and its descriptor goes through a socket. At 384 × 384 pixels that took 0.5 ms a
sample, where decoding takes 1.3. Here a worker uses its blocks again, and they stay mapped in both
processes. A block is free when the last tensor that sees it is gone, whoever held it and for
however long: who keeps all batches of an epoch gets as many blocks.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

Bytes = NDArray[np.uint8]
_FREE, _TAKEN = 0, 1  # a block's first byte
_DATA = 64  # where a block's data begin: aligned as torch aligns


class BatchMemory:
    """Gives a loader's worker, or the process that trains, memory for one batch after another.

    It is empty in every process that it is sent to.
    """

    def __init__(self) -> None:
        self._owner, self._blocks = uuid4().hex, list[_Block]()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._owner, self._blocks = uuid4().hex, []

    def batch(
        self, shape: Sequence[int], dtype: torch.dtype, write: Callable[[Tensor], None]
    ) -> Any:
        """Return a tensor that `write` has filled, or what will be one.

        Args:
            shape: Of the tensor.
            dtype: Of the tensor.
            write: Gets it to fill all of it; its contents are those of an earlier batch.

        Returns:
            The tensor. In a loader's worker, what becomes the tensor where the batch arrives.
        """
        if get_worker_info() is None:
            tensor = torch.empty(tuple(shape), dtype=dtype)
            write(tensor)
            return tensor
        sent = _Sent(self._free_block(math.prod(shape) * dtype.itemsize), tuple(shape), dtype)
        write(sent.tensor())
        return sent

    def _free_block(self, size: int) -> _Block:
        for block in self._blocks:
            if block.bytes[0] == _FREE and len(block.bytes) >= _DATA + size:
                break
        else:
            block = _Block(BlockName(os.getpid(), self._owner, len(self._blocks)), size)
            self._blocks.append(block)
        block.bytes[0] = _TAKEN
        return block


class BlockName(NamedTuple):
    """Which block of whom."""

    pid: int
    owner: str
    number: int


class _Block:
    """A worker's block of shared memory."""

    def __init__(self, name: BlockName, size: int) -> None:
        self.name = name
        self.shared = torch.empty(_DATA + size, dtype=torch.uint8).share_memory_()
        self.bytes: Bytes = self.shared.numpy()
        self.is_known = False
        """The process that trains has it mapped."""


class _Sent:
    """A batch in a worker's block, on its way: where it is unpickled it is a tensor."""

    def __init__(self, block: _Block, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._block, self._shape, self._dtype = block, shape, dtype

    def tensor(self) -> Tensor:
        """See the block as the batch."""
        return _view(self._block.bytes, self._shape, self._dtype)[0]

    def __reduce__(self) -> tuple[Any, ...]:
        known, self._block.is_known = self._block.is_known, True
        shared = None if known else self._block.shared
        return _receive, (self._block.name, shared, self._shape, self._dtype)


_received: dict[BlockName, Bytes] = {}
"""Workers' blocks that this process has mapped."""


def _receive(
    name: BlockName, shared: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """See a worker's block as a batch, and give the block back when nobody sees it any more."""
    if shared is not None:
        alive = {process.pid for process in multiprocessing.active_children()}
        for other in [key for key in _received if key.pid not in alive]:
            del _received[other]
        _received[name] = shared.numpy()
    block = _received[name]
    tensor, seen = _view(block, shape, dtype)
    # torch's storage keeps this array, and with it every tensor that shares the storage.
    weakref.finalize(seen, _give_back, block, os.getpid())
    return tensor


def _give_back(block: Bytes, pid: int) -> None:
    if os.getpid() == pid:  # what a forked process has is a copy: the batch may still be in use
        block[0] = _FREE


def _view(block: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Bytes]:
    seen = block[_DATA : _DATA + math.prod(shape) * dtype.itemsize]
    return torch.from_numpy(seen).view(dtype).view(shape), seen
