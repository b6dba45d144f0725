"""Save checkpoints while the run goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler

from vlm_composer.ranks import on_rank_zero
from vlm_composer.training.checkpoint_file import write_checkpoint
from vlm_composer.training.checkpoint_folder import CheckpointFolder, checkpoint_name
from vlm_composer.training.checkpoint_state import Snapshot, capture

log = logging.getLogger(__name__)

_THREAD = "checkpoint"


class Checkpointer(Callback):
    """Saves at every interval and at the end.

    The ranks wait while the snapshot is copied to the CPU, no longer: rank 0 writes and uploads it
    from a thread, one at a time. An upload that fails for good ends the run at the next batch.

    Composer's own saving is not used: it writes in torch's pickle format, not atomically, uploads
    from processes that outlive a killed run, looks for its newest checkpoint through a symbolic
    link that can be stale, and deletes old ones on local disks only.

    Args:
        folder: Where they go, on rank 0.
        interval: How often, for example `200ba` or `1ep`.
        facts: What every checkpoint says of the run, for example the towers' identity.
    """

    def __init__(
        self, folder: CheckpointFolder | None, interval: str, facts: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.facts = facts
        self._due = create_interval_scheduler(interval, include_end_of_training=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=_THREAD)
        self._writing: Future[None] | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Raise where the last checkpoint could not be saved."""
        del state, logger
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save where an interval in batches ends, or the run does."""
        del logger
        if self._due(state, Event.BATCH_CHECKPOINT):
            self.save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save where an interval in epochs ends."""
        del logger
        if self._due(state, Event.EPOCH_CHECKPOINT):
            self.save(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for the last checkpoint."""
        del state, logger
        self.wait()

    def save(self, state: State) -> None:
        """Take a snapshot and start writing it; all ranks must call this."""
        self.wait()
        snapshot = capture(state)
        if self.folder is not None:
            timestamp = state.timestamp
            name = checkpoint_name(timestamp.epoch.value, timestamp.batch.value)
            self._writing = self._thread.submit(self._write, self.folder, snapshot, name)

    def wait(self) -> None:
        """Return when what was saved is in its place; all ranks must call this.

        Raises:
            OSError: It could not be written.
        """
        writing, self._writing = self._writing, None
        on_rank_zero(lambda: writing.result() if writing is not None else None)

    def close(self, state: State, logger: Logger) -> None:
        """End the thread, after what it is doing."""
        del state, logger
        # Where a run fails, Python's garbage collector may close it from the thread itself.
        is_own = threading.current_thread().name.startswith(_THREAD)
        self._thread.shutdown(wait=not is_own)

    def _write(self, folder: CheckpointFolder, snapshot: Snapshot, name: str) -> None:
        path = folder.scratch_path(name)
        try:
            write_checkpoint(path, snapshot.tensors, {**snapshot.document, **self.facts})
            folder.add(path, name)
        finally:
            path.unlink(missing_ok=True)
