"""The rows of `resume.py`'s table: what a disturbed run is promised, and how far it is from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm_composer.training.checkpoint_file import CheckpointFile
from vlm_composer.training.checkpoint_schema import WEIGHTS

BATCHES, EPOCH = 26, 11
"""Batches of a run and of an epoch."""
RELATIVE = 1e-5
"""How far losses may be apart on another number of ranks."""


@dataclass
class Row:
    """One disturbed run."""

    name: str
    ranks: tuple[int, int]
    """Before and after the disturbance."""
    parallelism: tuple[str, str]
    batches: int = BATCHES
    store: str = "s3"
    exact: bool = True
    """Promised bitwise; otherwise the same samples and losses within `RELATIVE`."""
    ok: bool = False
    faults: list[str] = field(default_factory=list)
    bitwise: bool = False
    loss_error: float = 0.0
    samples_lost_or_repeated: int = 0
    seconds_to_new_batch: float = 0.0
    checkpoint_bytes: int = 0

    @property
    def run_name(self) -> str:
        """Name of its run, and of the run's files."""
        return self.name.replace(" ", "-").replace("://", "")

    def compare_batches(self, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
        """Note how far the batches that a run computed are from those of the undisturbed run.

        Args:
            found: A record of every batch, in the order of computing.
            expected: Those of the undisturbed run.
        """
        by_batch = {record["batch"]: record for record in expected}
        if {record["batch"] for record in found} != by_batch.keys():
            self.faults.append("batches are missing")
        self.bitwise = True
        for record in found:  # a batch that was computed twice is judged twice
            other = by_batch[record["batch"]]
            self.samples_lost_or_repeated += len(set(other["ids"]) ^ set(record["ids"]))
            error = abs(record["loss"] - other["loss"]) / other["loss"]
            self.loss_error = max(self.loss_error, error)
            self.bitwise &= record["loss"] == other["loss"] and record["lr"] == other["lr"]
            if self.exact and record["ids"] != other["ids"]:
                self.faults.append(f"batch {record['batch']}: other samples or another order")
        if self.exact and not self.bitwise:
            self.faults.append("not bitwise: losses or learning rates differ")
        if self.loss_error > RELATIVE:
            self.faults.append(f"losses are {self.loss_error:.1e} apart")
        if self.samples_lost_or_repeated:
            self.faults.append(f"{self.samples_lost_or_repeated} samples lost or repeated")

    def compare_ends(self, final: CheckpointFile, reference: CheckpointFile) -> None:
        """Note how far a run's last checkpoint is from that of the undisturbed run."""
        self.checkpoint_bytes = final.path.stat().st_size
        hashes, expected = final.document["hashes"], reference.document["hashes"]
        self.bitwise &= hashes == expected
        if self.exact and hashes != expected:
            differing = [name for name, value in expected.items() if hashes.get(name) != value]
            self.faults.append(f"not bitwise: {len(differing)} tensors differ")
        trained = 4 * sum(final.tensor(n).numel() for n in final.names if n.startswith(WEIGHTS))
        beside = 40_000 + 30_000 * max(self.ranks)  # position, settings; each rank's random state
        if not 3 * trained < self.checkpoint_bytes < 3 * trained + beside:
            self.faults.append(f"{self.checkpoint_bytes} bytes for {trained // 4} trained weights")


def conclude(rows: Sequence[Row], folder: Path, json_file: Path | None) -> int:
    """Sum a table up, write it down where asked for, and keep the runs' folder for what fell short.

    Returns:
        The exit code.
    """
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} rows hold what is promised")
    if failed:
        print(f"logs are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0
