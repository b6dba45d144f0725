"""A training as its user starts it, through Composer's launcher, and what it logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_composer.training.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent


class LaunchedRun:
    """A run that has been started and writes its metrics, each step's speed among them, to a file.

    Args:
        yaml: Of the run.
        folder: Where its log and metrics are put.
        ranks: Processes, each an equal share of the global batch.
        threads: Of each; all cores where it is None.
        overrides: Keys of the yaml, dotted, with their values.
    """

    def __init__(
        self,
        yaml: Path,
        folder: Path,
        ranks: int = 1,
        threads: int | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log, self._metrics = folder / "run.log", folder / "metrics.jsonl"
        settings = {
            "callbacks.speed_monitor.window_size": 1,
            "loggers.jsonl.path": self._metrics,
            "run_folder": folder / "run",
            **(overrides or {}),
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks)),
                    *(str(ROOT / "vlm_composer" / "train.py"), str(yaml)),
                    *as_arguments(settings),
                ],
                cwd=ROOT,
                env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
                stdout=log,
                stderr=log,
            )

    def metrics(self) -> dict[str, list[float]]:
        """Wait for its end and return every metric's values, in the order logged.

        Raises:
            RuntimeError: It failed; the message is the end of its log.
        """
        if self._process.wait():
            raise RuntimeError("\n".join(self._log.read_text().splitlines()[-25:]))
        rows = read_metrics(self._metrics)
        return {name: [value for _, value in values] for name, values in rows.items()}


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Keys of a yaml with their values, as the command line takes them."""
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}
    return [f"{key}={json.dumps(value)}" for key, value in plain.items()]
