"""Count the answers that `max_seq_len` cuts."""

from __future__ import annotations

import logging

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

log = logging.getLogger(__name__)


class CutAnswers(Callback):
    """Log how many answers of the training set were cut, and how many of their tokens.

    The counts go to the loggers as `data/cut_answers` and `data/cut_answer_tokens` at the end of
    every epoch, and into the log where there are any.
    """

    def __init__(self) -> None:
        self._answers = self._tokens = 0

    def batch_start(self, state: State, logger: Logger) -> None:
        """Count this rank's batch."""
        del logger
        num_cut = state.batch["num_cut"]
        self._answers += sum(cut > 0 for cut in num_cut)
        self._tokens += sum(num_cut)

    def state_dict(self) -> dict[str, int]:
        """The counts of all ranks, so that a resumed epoch goes on counting; collective."""
        answers, tokens = torch.tensor(dist.all_gather_object([self._answers, self._tokens])).sum(0)
        return {"answers": int(answers), "tokens": int(tokens)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the counts up, on rank 0."""
        if dist.get_global_rank() == 0:
            self._answers, self._tokens = state["answers"], state["tokens"]

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Add the ranks' counts up and log them."""
        counts = state.device.tensor_to_device(torch.tensor([self._answers, self._tokens]))
        dist.all_reduce(counts, reduce_operation="SUM")
        answers, tokens = counts.tolist()
        self._answers = self._tokens = 0
        logger.log_metrics({"data/cut_answers": answers, "data/cut_answer_tokens": tokens})
        if answers:
            log.warning(
                "%d answers were longer than max_seq_len and lost %d tokens in this epoch.",
                answers,
                tokens,
            )
