"""What reports on the steps of a run have in common: which steps count, and when to tell."""

from __future__ import annotations

from abc import abstractmethod

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler


class StepReport(Callback):
    """A report at an interval and at the end of a run.

    A step lasts from the request for its batch to its end: waiting for data counts, evaluation and
    checkpoints do not. The first steps, which warm caches up and compile, are left out.

    Args:
        warmup_batches: Steps of this process that are left out.
        interval: How often it reports; it always does at the end of a run.
    """

    def __init__(self, *, warmup_batches: int, interval: str) -> None:
        self.warmup_batches = warmup_batches
        self.num_steps = 0
        """Steps that the next report is about."""
        self._due = create_interval_scheduler(interval, include_end_of_training=False)
        self._seen = 0

    @abstractmethod
    def add_step(self, state: State) -> None:
        """Take in a step that counts and has just ended."""

    @abstractmethod
    def report(self, logger: Logger) -> None:
        """Tell about `num_steps` steps, one at least."""

    def batch_end(self, state: State, logger: Logger) -> None:
        """Take in the step, unless it is one of the first."""
        del logger
        self._seen += 1
        if self._seen > self.warmup_batches:
            self.num_steps += 1
            self.add_step(state)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Report where an interval in batches ends."""
        if self._due(state, Event.BATCH_CHECKPOINT) and self.num_steps:
            self.report(logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Report where an interval in epochs ends."""
        if self._due(state, Event.EPOCH_CHECKPOINT) and self.num_steps:
            self.report(logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Report what is left."""
        del state
        if self.num_steps:
            self.report(logger)
