"""W&B, without which a run continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from composer.core import State
from composer.loggers import Logger, WandBLogger
from composer.utils import dist

from vlm_composer.outages import best_effort


class DispensableWandB(WandBLogger):
    """Composer's W&B logger; once it fails in any way, the run continues without it.

    It may not start (a name that W&B refuses, no network). Later its own process may end: Slurm
    sends SIGTERM to every process of a job, and the next metric would raise before the run has
    saved.
    """

    def init(self, state: State, logger: Logger) -> None:
        leads = self._enabled
        self._attempt(lambda: super(DispensableWandB, self).init(state, logger))
        if leads and not self._enabled:  # the other ranks wait for the names of entity and project
            dist.broadcast_object_list(["", ""], src=0)

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
        done = False
        with best_effort("log to W&B"):
            action()
            done = True
        self._enabled &= done
