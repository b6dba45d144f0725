"""The benchmark of throughput runs from end to end, on tiny towers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = ("RANK", "WORLD_SIZE")
"""How the variables end that a Trainer of an earlier test leaves, and that Hugging Face's obeys."""


@pytest.mark.slow
def test_quick_run_asserts_gradients_and_fills_every_row(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs it: the demo extra")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "throughput.py", "--quick", "--json", report],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.endswith(RANK)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["facts"]["gradients"]["ours_fp32"] < 1e-5
    losses = next(row for row in found["rows"] if "losses" in row["name"])
    assert losses["ok"], losses
    assert len(found["rows"]) == 8
    assert all(value for row in found["rows"] for value in row["values"].values())
