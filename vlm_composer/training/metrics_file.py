"""Metrics to a local file, for programs to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist


class MetricsFile(LoggerDestination):
    """One JSON object a line: `{"batch": 12, "loss/train/total": 3.2, …}`. Rank 0 writes.

    Metrics that are logged for the same batch stand in one line or in several. A resumed run goes
    on where its checkpoint was saved: lines of batches that are trained again are replaced.

    Args:
        path: The file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None
        self._batch = 0

    def init(self, state: State, logger: Logger) -> None:
        """Open the file."""
        del state, logger
        if dist.get_global_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def state_dict(self) -> dict[str, int]:
        """Where the file ends."""
        return {} if self._file is None else {"bytes": self._file.tell()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Cut off what was logged after the checkpoint."""
        if self._file is not None and self.path.stat().st_size > state["bytes"]:
            self._file.truncate(state["bytes"])

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append a line."""
        if self._file is None:
            return
        self._batch = self._batch if step is None else step
        plain = {k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}
        self._file.write(json.dumps({"batch": self._batch, **plain}) + "\n")

    def close(self, state: State, logger: Logger) -> None:
        """Close the file."""
        del state, logger
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read a file of `MetricsFile`.

    Args:
        path: The file.

    Returns:
        For each metric its values in the order written, each with its batch.
    """
    metrics: dict[str, list[tuple[int, float]]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        batch = row.pop("batch")
        for name, value in row.items():
            metrics.setdefault(name, []).append((batch, value))
    return metrics
