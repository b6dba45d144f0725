"""The line that says how fast a run is and how long a full epoch takes."""

from __future__ import annotations

import logging
import time

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

log = logging.getLogger(__name__)


class SpeedReport(Callback):
    """Log average step time, samples/s and the estimate for a full epoch.

    A step is timed from the request for its batch to its end: waiting for data counts, evaluation
    and checkpoints do not. The first steps, which warm caches up and compile, are left out.

    Args:
        full_epoch_samples: Samples of the epoch that is estimated.
        warmup_batches: Steps of this process that are left out.
        interval: How often the line is logged; it always is at the end of a run.
    """

    def __init__(
        self, full_epoch_samples: int, *, warmup_batches: int = 3, interval: str = "100ba"
    ) -> None:
        self.full_epoch_samples = full_epoch_samples
        self.warmup_batches = warmup_batches
        self._due = create_interval_scheduler(interval, include_end_of_training=False)
        self._start = 0.0
        self._first_sample = 0
        self._seen = self._steps = self._samples = self._micro_steps = 0
        self._seconds = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        del logger
        self._start = time.perf_counter()
        self._first_sample = int(state.timestamp.sample)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop the clock.

        A GPU works on while the clock stops; over many steps the queue is as long at every end, so
        that the average holds.
        """
        del logger
        self._seen += 1
        if self._seen <= self.warmup_batches:
            return
        self._seconds += time.perf_counter() - self._start
        self._steps += 1
        samples = int(state.timestamp.sample) - self._first_sample
        self._samples += samples
        size = state.device_train_microbatch_size
        assert isinstance(size, int)
        self._micro_steps += -(-samples // (size * dist.get_world_size()))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Log the line where an interval in batches ends."""
        if self._due(state, Event.BATCH_CHECKPOINT):
            self._report(logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Log the line where an interval in epochs ends."""
        if self._due(state, Event.EPOCH_CHECKPOINT):
            self._report(logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log the line for the whole run."""
        del state
        self._report(logger)

    def _report(self, logger: Logger) -> None:
        if not self._steps:
            log.warning(
                "No speed report: the run ended within its %d warm-up steps.", self.warmup_batches
            )
            return
        step = self._seconds / self._steps
        samples_per_second = self._samples / self._seconds
        hours = self.full_epoch_samples / samples_per_second / 3600
        log.info(
            "Average step time %.3f s (micro-step %.3f s), %.2f samples/s; one epoch of %s samples "
            "takes %.2f h at this speed (measured over %d steps after %d of warm-up).",
            step,
            self._seconds / self._micro_steps,
            samples_per_second,
            f"{self.full_epoch_samples:,}",
            hours,
            self._steps,
            self.warmup_batches,
        )
        logger.log_metrics(
            {
                "speed/step_seconds": step,
                "speed/samples_per_second": samples_per_second,
                "speed/full_epoch_hours": hours,
            }
        )
