"""The line that says how fast a run is and how long a full epoch takes."""

from __future__ import annotations

import logging
import time

from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from vlm_composer.training.step_report import StepReport

log = logging.getLogger(__name__)


class SpeedReport(StepReport):
    """Log average step time, samples/s and the estimate for a full epoch, over the run so far.

    Args:
        full_epoch_samples: Samples of the epoch that is estimated.
        warmup_batches: As in `StepReport`.
        interval: As in `StepReport`.
    """

    def __init__(self, full_epoch_samples: int, *, warmup_batches: int, interval: str) -> None:
        super().__init__(warmup_batches=warmup_batches, interval=interval)
        self.full_epoch_samples = full_epoch_samples
        self._start = 0.0
        self._first_sample = 0
        self._samples = self._micro_steps = 0
        self._seconds = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        del logger
        self._start = time.perf_counter()
        self._first_sample = int(state.timestamp.sample)

    def add_step(self, state: State) -> None:
        """Stop the clock.

        A GPU works on while the clock stops; over many steps the queue is as long at every end, so
        that the average holds.
        """
        self._seconds += time.perf_counter() - self._start
        samples = int(state.timestamp.sample) - self._first_sample
        self._samples += samples
        size = state.device_train_microbatch_size
        assert isinstance(size, int)
        self._micro_steps += -(-samples // (size * dist.get_world_size()))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log the line for the whole run."""
        super().fit_end(state, logger)
        if not self.num_steps:
            log.warning(
                "No speed report: the run ended within its %d warm-up steps.", self.warmup_batches
            )

    def report(self, logger: Logger) -> None:
        """Log the line."""
        step = self._seconds / self.num_steps
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
            self.num_steps,
            self.warmup_batches,
        )
        logger.log_metrics(
            {
                "speed/step_seconds": step,
                "speed/samples_per_second": samples_per_second,
                "speed/full_epoch_hours": hours,
            }
        )
