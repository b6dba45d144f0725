"""Where a training waits for orders at the end of a step, and what it reports of the steps."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path


@dataclass(frozen=True)
class Order:
    """What a contender is to do next."""

    steps: int
    measure_memory: bool = False
    bare: bool = False
    """Train the last batch again in a bare loop (ours only)."""


@dataclass
class Clock:
    """Time that passed between `start` and `stop`, summed."""

    wall: float = 0.0
    cpu: float = 0.0
    """Of all threads of the process."""
    _started: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        """Go on."""
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Pause."""
        self.wall += time.perf_counter() - self._started[0]
        self.cpu += time.process_time() - self._started[1]


@dataclass
class Chunk:
    """What a contender reports when an order is carried out."""

    first_step: int
    steps: int
    time: Clock = field(default_factory=Clock)
    loading: Clock = field(default_factory=Clock)
    """The part of `time` that Composer waited for the loader."""
    bare: Clock = field(default_factory=Clock)
    losses: list[float] = field(default_factory=list)
    weights_mib: float = 0.0
    """Resident memory between two steps."""
    peak_mib: float = 0.0
    """Most resident memory during the steps."""


class Stopped(BaseException):
    """Ends a training from the inside. Not an Exception: nothing may handle it."""


class Gate:
    """Where a training waits for orders; lives in the contender's process.

    Args:
        connection: To the process that gives them.
        losses: What the training appends every step's loss to.
    """

    def __init__(self, connection: Connection, losses: list[float]) -> None:
        self._connection = connection
        self._losses = losses
        self._done = 0
        self.order = Order(0)
        self.chunk = Chunk(0, 0)

    def open(self) -> None:
        """Say that all is ready, and wait for the first order."""
        self._connection.send(self.chunk)
        self._wait()

    def step_ended(self, after: Callable[[Chunk], None] | None = None) -> None:
        """Count a step; where it was the order's last, report and wait for the next.

        Args:
            after: Called before the report, when the clock has stopped.
        """
        self._done += 1
        if self._done < self.chunk.first_step + self.order.steps:
            return
        self.chunk.time.stop()
        if self.order.measure_memory:
            self.chunk.peak_mib = _memory_mib("VmHWM")
        if after is not None:
            after(self.chunk)
        self.chunk.losses = self._losses[self.chunk.first_step :]
        self._connection.send(self.chunk)
        self._wait()

    def _wait(self) -> None:
        try:
            order = self._connection.recv()
        except (EOFError, ConnectionResetError):  # nobody is left to ask
            order = None
        if order is None:
            raise Stopped
        self.order = order
        self.chunk = Chunk(self._done, order.steps)
        if order.measure_memory:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what the last step freed is none of the weights
            self.chunk.weights_mib = _memory_mib("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.chunk.time.start()


def _memory_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}")
