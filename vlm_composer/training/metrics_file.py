"""Metrics to a local file, for programs to read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from composer.loggers import LoggerDestination
from composer.utils import dist

from vlm_composer.local_files import RunLines
from vlm_composer.mds.json_object import is_count, read_rows

log = logging.getLogger(__name__)


class MetricsFile(LoggerDestination):
    """One JSON object a line: `{"batch": 12, "loss/train/total": 3.2, …}`. Rank 0 writes.

    Metrics that are logged for the same batch stand in one line or in several. A resumed run goes
    on where its checkpoint was saved: lines of batches that are trained again are replaced.

    Args:
        path: The file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self._lines = RunLines(path)
        self._batch = 0

    def state_dict(self) -> dict[str, int | None]:
        """Where the file ends."""
        return self._lines.state_dict()

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Cut off what was logged after the checkpoint."""
        if dist.get_global_rank() == 0:
            self._lines.load_state_dict(state)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append a line."""
        if dist.get_global_rank() == 0:
            self._batch = self._batch if step is None else step
            self._lines.add({"batch": self._batch, **metrics})


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read a file of `MetricsFile`.

    Args:
        path: The file.

    Returns:
        For each metric its values in the order written, each with its batch. Lines that are not
        those of a run, as a half-written last one, are left out with a warning.

    Raises:
        OSError: It cannot be read.
    """
    metrics: dict[str, list[tuple[int, float]]] = {}
    rows, unread = read_rows(Path(path))
    for row in rows:
        batch = row.pop("batch", None)
        if not is_count(batch):
            unread += 1
            continue
        for name, value in row.items():
            if type(value) in (int, float):
                metrics.setdefault(name, []).append((batch, value))
    if unread:
        log.warning("%s: %d lines are not metrics of a run and are left out.", path, unread)
    return metrics
