"""W&B, without which a run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from composer.loggers import WandBLogger

log = logging.getLogger(__name__)


class DispensableWandB(WandBLogger):
    """Composer's W&B logger; the run goes on without it when W&B's own process ends.

    Slurm sends SIGTERM to every process of a job, W&B's among them, which obeys. The next metric
    would raise before the run has saved.
    """

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        self._attempt(lambda: super(DispensableWandB, self).log_hyperparameters(hyperparameters))

    def log_table(self, *args: Any, **options: Any) -> None:
        self._attempt(lambda: super(DispensableWandB, self).log_table(*args, **options))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._attempt(lambda: super(DispensableWandB, self).log_metrics(metrics, step))

    def log_images(self, *args: Any, **options: Any) -> None:
        self._attempt(lambda: super(DispensableWandB, self).log_images(*args, **options))

    def post_close(self) -> None:
        if self._enabled:
            self._attempt(super().post_close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except ConnectionError as error:
            self._enabled = False
            log.warning("W&B's process has ended (%s); the run goes on without it.", error)
