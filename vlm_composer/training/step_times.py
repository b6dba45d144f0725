"""What the time of a step is spent on, and how much of it waits for data."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, NamedTuple, Protocol

import torch
from composer.core import State
from composer.loggers import Logger
from torch import nn

from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.training.step_parts import PARTS
from vlm_composer.training.step_report import StepReport

log = logging.getLogger(__name__)


class Clock(Protocol):
    """Takes marks in time and tells what lies between them."""

    def mark(self) -> Any:
        """Take a mark now."""

    def is_past(self, mark: Any) -> bool:
        """Whether the device has come to a mark."""

    def wait_for(self, mark: Any) -> None:
        """Wait until it has."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks that are past."""


class HostClock:
    """The clock of a CPU, which does one thing after the other."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_past(self, mark: float) -> bool:
        del mark
        return True

    def wait_for(self, mark: float) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Events on the current stream: a mark waits for nothing and is read once the GPU is past it.

    **Not run on a GPU.** Time in which the GPU has nothing to do belongs to the part in which the
    host keeps it waiting. Composer empties the queue at the end of every step, to log the loss, so
    that a wait for data is one of the GPU as well.
    """

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait_for(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


class Lap(NamedTuple):
    """A stretch of a step between two marks, and the part that it was spent on."""

    part: str
    start: Any
    end: Any


class StepTimes(StepReport):
    """Log the seconds of a step by part, averaged over an interval.

    A step is cut into laps, each of which is counted to one part when it ends, so that the parts
    add up to the step. The forward is cut by hooks on the modules, the rest by Composer's events:

    - `data_wait`: from the request for a batch until every rank has one.
    - `vision`, `connector`, `llm_forward`: forwards of the tower, the connector, the decoder.
    - `head_and_loss`: forward of the head and the loss.
    - `backward`: with the layers that it recomputes and the exchange of gradients in it.
    - `optimizer`: with clipping and the checks of the gradients before it.
    - `other`: embedding, batches to the device, logging, callbacks.

    The hooks act only while a micro-batch of training is in its forward: evaluation, captions and
    recomputation pass them by. The figures that are logged are those of rank 0; it waits for the
    rank whose data come last.

    Args:
        vlm: The model that is trained.
        warmup_batches: As in `StepReport`.
        interval: Steps that are averaged over, and how often that is logged.
    """

    def __init__(self, vlm: VisionLanguageModel, *, warmup_batches: int, interval: str) -> None:
        super().__init__(warmup_batches=warmup_batches, interval=interval)
        self.clock: Clock = HostClock()
        self._vlm = vlm
        self._hooks: list[Any] = []
        self._in_forward = False
        self._last_mark: Any = None
        self._step: list[Lap] = []
        self._unread: deque[Lap] = deque()
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Hook the modules and the optimizer, which have been wrapped by now."""
        del logger
        if state.device.name == "gpu":
            self.clock = CudaClock()
        llm = self._vlm.language_model
        self._unhook()
        self._hook(self._vlm.vision_tower, "vision")
        self._hook(self._vlm.connector, "connector")
        self._hook(llm.decoder, "llm_forward")
        self._hook(llm.model.get_output_embeddings(), "head_and_loss")
        for optimizer in state.optimizers:
            self._hooks.append(
                optimizer.register_step_post_hook(lambda *_: self._end_lap("optimizer"))
            )

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Begin a step."""
        del state, logger
        self._in_forward = False
        self._step = []
        self._last_mark = self.clock.mark()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch is there."""
        del state, logger
        self._end_lap("data_wait")

    def before_forward(self, state: State, logger: Logger) -> None:
        """A micro-batch begins."""
        del state, logger
        self._end_lap("other")
        self._in_forward = True

    def before_loss(self, state: State, logger: Logger) -> None:
        """Its forward has ended."""
        del state, logger
        self._end_lap("other")
        self._in_forward = False

    def after_loss(self, state: State, logger: Logger) -> None:
        """Its loss is there."""
        del state, logger
        self._end_lap("head_and_loss")

    def before_backward(self, state: State, logger: Logger) -> None:
        """Its backward begins."""
        del state, logger
        self._end_lap("other")

    def after_backward(self, state: State, logger: Logger) -> None:
        """Its backward has ended."""
        del state, logger
        self._end_lap("backward")

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """All micro-batches are through, and the gradients clipped; the optimizer is next."""
        del state, logger
        self._end_lap("optimizer")

    def add_step(self, state: State) -> None:
        """Keep the laps of the step, and read those that the device has passed."""
        del state
        self._end_lap("other")
        self._unread.extend(self._step)
        while self._unread and self.clock.is_past(self._unread[0].end):
            self._read(self._unread.popleft())

    def report(self, logger: Logger) -> None:
        """Log the parts, and begin anew."""
        while self._unread:
            self.clock.wait_for(self._unread[0].end)
            self._read(self._unread.popleft())
        step = sum(self._seconds.values()) / self.num_steps
        parts = {part: seconds / self.num_steps for part, seconds in self._seconds.items()}
        data_wait_share = parts["data_wait"] / step
        logger.log_metrics(
            {f"time/{part}": seconds for part, seconds in parts.items()}
            | {"time/data_wait_share": data_wait_share}
        )
        log.info(
            "A step takes %.3f s (average of %d): %s.",
            step,
            self.num_steps,
            ", ".join(f"{PARTS[part]} {parts[part] / step:.1%}" for part in PARTS),
        )
        self.num_steps = 0
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log what is left, and leave the model as it was."""
        super().fit_end(state, logger)
        self._unhook()

    def _hook(self, module: nn.Module, part: str) -> None:
        def begin(*_: Any) -> None:
            if self._in_forward:
                self._end_lap("other")

        def end(*_: Any) -> None:
            if self._in_forward:
                self._end_lap(part)

        # First and last, so that what FSDP2's own hooks do is the module's: gathering its weights.
        self._hooks.append(module.register_forward_pre_hook(begin, prepend=True))
        self._hooks.append(module.register_forward_hook(end))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _end_lap(self, part: str) -> None:
        mark = self.clock.mark()
        self._step.append(Lap(part, self._last_mark, mark))
        self._last_mark = mark

    def _read(self, lap: Lap) -> None:
        self._seconds[lap.part] += self.clock.seconds(lap.start, lap.end)
