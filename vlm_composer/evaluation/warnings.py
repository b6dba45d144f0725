"""What goes wrong while a run goes on, and what to do about it."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from vlm_composer.local_files import RunLines

log = logging.getLogger(__name__)

DEVIATIONS = 6
"""Median absolute deviations that a loss must lie above the median to be a spike: in data whose
losses vary, twice the median is nothing unusual."""
EXPLOSIONS = 3
"""Gradients within a running median's window that must be far above it before it is said: one alone
is an unusual batch's, and clipping takes care of it."""


class LiveWarnings(LoggerDestination):
    """Reads what is logged, and warns of what a healthy run does not show.

    | name | what is looked at |
    | --- | --- |
    | `loss_spike` | `loss/train/total` against its running median |
    | `gradient_exploding`, `gradient_zero` | `gradients/norm`, before clipping, likewise |
    | `gap_not_opening` | `evidence/gap_wrong`, after a share of the run |
    | `connector_collapsed` | `evidence/output_spread`, once something was trained |
    | `dead_latents` | `evidence/latent_spread`, after the same share of the run as the gap |
    | `data_wait` | `time/data_wait_share`, of StepTimes |

    A warning goes to the log with what to do, to the metrics as `warnings/NAME`, and to a file as
    `{"batch": …, "name": …, "message": …}`. After one, the same is not said again for a while. What
    is not logged, for its callback is off, is not looked at. Rank 0 warns.

    Args:
        path: The file; it is made with the first warning, and a resumed run goes on in it, after
            the last before its checkpoint.
        gap_after: Share of the run after which the gap must be open and latents alive.
        min_gap: Nats an answer token that an open gap has at least.
        loss_factor: Multiple of the running median above which a loss is a spike.
        gradient_factor: Multiple of the running median above which a gradient norm explodes; it is
            said at the third time within `window` batches.
        min_output_spread: `evidence/output_spread` below which the connector has collapsed.
        max_dead_latents: Share of the latents that may be dead.
        max_data_wait: Share of a step that may be waiting for data.
        window: Batches of a running median; nothing is judged by fewer than half of them.
        cooldown: Batches for which the same warning is not repeated.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        gap_after: float,
        min_gap: float,
        loss_factor: float,
        gradient_factor: float,
        min_output_spread: float,
        max_dead_latents: float,
        max_data_wait: float,
        window: int,
        cooldown: int,
    ) -> None:
        self._lines = RunLines(path)
        self._gap_after, self._min_gap = gap_after, min_gap
        self._loss_factor, self._gradient_factor = loss_factor, gradient_factor
        self._min_output_spread, self._max_dead_latents = min_output_spread, max_dead_latents
        self._max_data_wait = max_data_wait
        self._cooldown = cooldown
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)
        self._exploded: deque[bool] = deque(maxlen=window)
        self._warned_at: dict[str, int] = {}
        self._state: State | None = None
        self._logger: Logger | None = None
        self._looks: dict[str, Callable[[float], None]] = {
            "loss/train/total": self._look_at_loss,
            "gradients/norm": self._look_at_gradient,
            "evidence/gap_wrong": self._look_at_gap,
            "evidence/output_spread": self._look_at_output,
            "evidence/latent_spread": self._look_at_latents,
            "time/data_wait_share": self._look_at_data_wait,
        }

    def init(self, state: State, logger: Logger) -> None:
        """Remember whose run it is."""
        self._state, self._logger = state, logger

    def state_dict(self) -> dict[str, Any]:
        """What was seen and said so far."""
        return {
            **self._lines.state_dict(),
            "losses": list(self._losses),
            "norms": list(self._norms),
            "exploded": list(self._exploded),
            "warned_at": dict(self._warned_at),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as at the checkpoint: what was warned of after it will be warned of again."""
        if dist.get_global_rank() == 0:
            self._lines.load_state_dict(state)
            self._losses.extend(state["losses"])
            self._norms.extend(state["norms"])
            self._exploded.extend(state["exploded"])
            self._warned_at.update(state["warned_at"])

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Look at what is logged."""
        del step
        if dist.get_global_rank() == 0:
            for name, look in self._looks.items():
                if name in metrics:
                    look(float(metrics[name]))

    def _look_at_loss(self, loss: float) -> None:
        median = self._median(self._losses)
        if median is not None and loss > self._loss_factor * median:
            deviation = statistics.median(abs(x - median) for x in self._losses)
            if loss > median + DEVIATIONS * deviation:
                self._warn(
                    "loss_spike",
                    f"the loss is {loss:.3g}, its running median {median:.3g}. One such batch is "
                    "the data's: look at its samples. Where it stays up or comes again, lower "
                    "optimizer.lr, lengthen scheduler.t_warmup or lower algorithms."
                    "gradient_clipping.clipping_threshold, and start again from the checkpoint "
                    "before it (load_path)",
                )
        self._losses.append(loss)

    def _look_at_gradient(self, norm: float) -> None:
        median = self._median(self._norms)
        self._exploded.append(median is not None and norm > self._gradient_factor * median)
        if norm == 0:
            self._warn(
                "gradient_zero",
                "every gradient is zero: nothing is learned. Look whether the loss is 0, whether "
                "the samples have answers, and whether a weight of the connector has become 0 or "
                "so large that its units are dead (lower optimizer.lr)",
            )
        elif self._exploded[-1] and (times := sum(self._exploded)) >= EXPLOSIONS:
            self._warn(
                "gradient_exploding",
                f"the gradient norm before clipping is {norm:.3g}, its running median "
                f"{median:.3g}, and such norms came {times} times in {len(self._exploded)} "
                "batches. Clipping (algorithms.gradient_clipping) bounds what one such step does; "
                "lower optimizer.lr or lengthen scheduler.t_warmup",
            )
        self._norms.append(norm)

    def _look_at_gap(self, gap: float) -> None:
        share = self._share_of_run()
        if share >= self._gap_after and gap < self._min_gap:
            self._warn(
                "gap_not_opening",
                f"after {share:.0%} of the run the right image is worth {gap:.3f} nats a token "
                f"against another's (expected: {self._min_gap} or more): the language model does "
                "not look at it. Where evidence/gap_wrong rises from evaluation to evaluation, "
                "train longer (max_duration); else lower optimizer.lr where "
                "evidence/output_norm_ratio is in the hundreds, raise it where not, set "
                "connector.vision_ln: true, and see whether captions belong to their images",
            )

    def _look_at_output(self, spread: float) -> None:
        if self._batch() and spread < self._min_output_spread:
            self._warn(
                "connector_collapsed",
                f"the connector gives nearly the same for every image (evidence/output_spread "
                f"{spread:.2g}, expected: {self._min_output_spread} or more). Lower optimizer.lr, "
                "lengthen scheduler.t_warmup, and start again from a checkpoint before it, or "
                "anew; connector.vision_ln: true helps where the vision tower's patches have a "
                "large mean",
            )

    def _look_at_latents(self, alive: float) -> None:
        # With all of them dead the connector has collapsed, which is said already.
        if self._share_of_run() >= self._gap_after and 0 < alive < 1 - self._max_dead_latents:
            self._warn(
                "dead_latents",
                f"{1 - alive:.0%} of the latents give the same for every image: their places in "
                "the prompt are wasted. Fewer would do (connector.resampler.num_latents); a lower "
                "optimizer.lr or a longer scheduler.t_warmup may keep them alive",
            )

    def _look_at_data_wait(self, share: float) -> None:
        if share > self._max_data_wait:
            self._warn(
                "data_wait",
                f"{share:.0%} of a step is waiting for data: raise train_loader.num_workers while "
                "cores are idle, train_loader.prefetch_factor where batches come unevenly, and "
                "train_loader.dataset.predownload where shards come from a bucket",
            )

    def _warn(self, name: str, message: str) -> None:
        """Say it, unless it was said a short while ago."""
        batch = self._batch()
        if name in self._warned_at and batch - self._warned_at[name] < self._cooldown:
            return
        self._warned_at[name] = batch
        log.warning("Batch %d: %s.", batch, message)
        self._lines.add({"batch": batch, "name": name, "message": message})
        assert self._logger is not None
        self._logger.log_metrics({f"warnings/{name}": 1})

    def _batch(self) -> int:
        assert self._state is not None
        return self._state.timestamp.batch.value

    def _share_of_run(self) -> float:
        assert self._state is not None
        elapsed = self._state.get_elapsed_duration()
        return 0.0 if elapsed is None else elapsed.value

    @staticmethod
    def _median(values: deque[float]) -> float | None:
        assert values.maxlen is not None
        return statistics.median(values) if len(values) >= max(values.maxlen // 2, 1) else None
