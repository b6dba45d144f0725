"""`python -m vlm_composer.demo` from packages to the summary, on a run too short to learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def project(tmp_path, demo_folder):
    """A folder that looks like the project's root, with the session's prepared parts."""
    for name in ("yamls", "vlm_composer"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "demo").symlink_to(demo_folder)
    return tmp_path


@pytest.mark.slow
def test_a_run_too_short_to_learn_says_so(project):
    overrides = ["max_duration=2ba", "scheduler.t_warmup=1ba", "progress_bar=false"]
    done = subprocess.run(
        [sys.executable, "-m", "vlm_composer.demo", *overrides, "eval_subset_num_batches=1"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    summary = "\n".join(lines[lines.index("Six held-out images:") :])
    assert len(re.findall(r"^  true: \S.* model: ", summary, re.M)) == 6
    losses = [
        float(re.search(rf"{name}\s+(-?[\d.]+)", summary)[1])
        for name in ("before training", "right images", "wrong images", "images are worth")
    ]
    assert losses[3] == pytest.approx(losses[2] - losses[1], abs=0.0011)
    assert losses[3] < 0.3, "two steps cannot teach it to see"
    assert "NOT LEARNED: the images are worth less than the margin" in summary
    assert "Speed: too short a run to measure it" in summary
    report = re.search(r"^The whole run as a page, .*: (\S+)$", summary, re.M)[1]
    assert "did the connector learn to see?" in (project / report).read_text(encoding="utf-8")
    assert re.search(r"^The demo took [\d.]+ minutes\.$", summary, re.M)
    with Image.open(project / "runs" / "demo" / "captions.png") as sheet:
        assert sheet.width > 300
