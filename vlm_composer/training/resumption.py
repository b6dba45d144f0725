"""What Composer 0.32.1 leaves out when it resumes in the middle of an epoch."""

from __future__ import annotations

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import reproducibility


class RestoreRNG(Callback):
    """Restore the random state of a checkpoint before the first resumed batch.

    Composer restores it after fast-forwarding the data loader, which it does not do for a
    StreamingDataset: with dropout, the first resumed batch would differ from the uninterrupted
        run's.

    Args:
        trainer: Whose checkpoint was loaded; set after the Trainer is built.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Load the state once."""
        del state, logger
        trainer = self.trainer
        if trainer is not None and trainer._rng_state is not None:
            reproducibility.load_rng_state(trainer._rng_state)
            trainer._rng_state = None
