"""The norm of the gradients before they are clipped, which Composer computes and throws away."""

from __future__ import annotations

from composer import Algorithm, Event, Logger, State
from torch import Tensor
from torch.nn.utils import get_total_norm

from vlm_composer.training.trained_weights import whole


class GradientNorm(Algorithm):
    """Log `gradients/norm`, the global norm of a step's gradients before clipping.

    An algorithm, for callbacks come after all of these. Composer runs them from last to first when
    a batch has been trained, so that it must stand behind GradientClipping. Under FSDP2 all ranks
    add up their shards.
    """

    def __init__(self) -> None:
        self._norm: Tensor | None = None

    def match(self, event: Event, state: State) -> bool:
        del state
        return event in (Event.AFTER_TRAIN_BATCH, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.AFTER_TRAIN_BATCH:
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            self._norm = whole(get_total_norm(gradients))
        elif self._norm is not None:  # a GPU's queue is empty by now: it is not waited for
            logger.log_metrics({"gradients/norm": self._norm.item()})
            self._norm = None
