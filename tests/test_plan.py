"""The plan of the full recipe, as a user asks for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_composer import plan

STAGE1 = Path(__file__).parent.parent / "yamls" / "stage1.yaml"


def test_the_json_of_stage_1_holds_the_specified_parameters():
    done = subprocess.run(
        [sys.executable, "-m", "vlm_composer.plan", STAGE1, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    planned = json.loads(done.stdout)
    expected = {
        "resampler": 6927872,
        "projector": 75517952,
        "connector": 82445824,
        "vision_tower": 412987248,
        "llm": 8190735360,
    }
    assert expected.items() <= planned["parameters"].items()
    assert planned["parameters"]["trainable"] == 82445824
    assert planned["parameters"]["frozen"] == 412987248 + 8190735360
    assert planned["trained"] == ["resampler", "projector"]
    assert planned["checkpoint_bytes"] == 12 * 82445824
    assert planned["training_flops_per_sample"]["total"] == pytest.approx(3.47e12, rel=0.01)


def test_the_table_names_every_part(capsys):
    assert plan.main([str(STAGE1), "connector.vision_ln=true"]) == 0
    out = capsys.readouterr().out
    for text in ("vision_ln", "2,304  trained", "8,190,735,360  frozen", "0.99 GB", "total"):
        assert text in out


def test_mistakes_are_told_without_a_traceback(capsys):
    assert plan.main([str(STAGE1), "seeds=3"]) == 1
    assert "seeds: unknown key; did you mean 'seed'?" in capsys.readouterr().err
