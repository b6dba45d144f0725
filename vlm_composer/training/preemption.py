"""Stop at SIGTERM without losing a batch: spot preemption, `scancel`, an eviction."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from vlm_composer.training.checkpointing import Checkpointer

log = logging.getLogger(__name__)

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again."""
SAME_SIGNAL_SECONDS = 2.0
"""Signals this close are one: a scheduler signals the launcher and the ranks, and the launcher the
ranks again."""


ORPHAN_SECONDS = 30.0
"""How long a rank whose launcher is dead has to save: what Composer's launcher gives."""


class Preempted(Exception):
    """The run was told to stop, and has saved its checkpoint."""


class GracefulStop(Callback):
    """At SIGTERM, finishes the batch in hand, saves, and raises `Preempted` on every rank.

    It looks after every batch, of training and of evaluation; an evaluation that is under way is
    given up. A second SIGTERM ends the process at once. Composer's launcher gives the ranks 30
    seconds; a rank whose launcher is dead gives itself as many.

    Args:
        checkpointer: Saves.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer
        self._asked_at: float | None = None
        self._parent = os.getppid()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Take SIGTERM over from Composer, which ends the process."""
        del state, logger
        signal.signal(signal.SIGTERM, self._note)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look after a batch of training."""
        del logger
        self._look(state)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Look after a batch of evaluation."""
        del logger
        self._look(state)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if os.getppid() != self._parent:  # a peer that died with it would be waited for
                end = threading.Timer(ORPHAN_SECONDS, os._exit, [EXIT_CODE])
                end.daemon = True
                end.start()
        elif now - self._asked_at > SAME_SIGNAL_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _look(self, state: State) -> None:
        asked = torch.tensor([int(self._asked_at is not None)], dtype=torch.uint8)
        asked = state.device.tensor_to_device(asked)
        dist.all_reduce(asked, reduce_operation="MAX")
        if not asked.item():
            return
        batch = state.timestamp.batch.value
        log.warning("SIGTERM: stopping after batch %d.", batch)
        if batch:
            self._checkpointer.save(state)
            self._checkpointer.wait()
        raise Preempted(f"stopped by SIGTERM after batch {batch}")
