"""The run that `full_size.py` starts is one that the trial's yaml of today allows."""

from pathlib import Path

import pytest

from benchmarks.full_size import ACCUMULATION, MEASURED, MICROBATCH, WARM_UP, YAML, overrides
from benchmarks.launched_run import as_arguments
from vlm_composer.config import TrainConfig


@pytest.mark.parametrize("small", [False, True])
def test_its_settings_are_valid(tmp_path: Path, small: bool) -> None:
    config = TrainConfig.read(YAML, as_arguments(overrides(tmp_path, small)))
    assert config.global_train_batch_size == MICROBATCH * ACCUMULATION
    assert config.max_duration == f"{WARM_UP + MEASURED}ba"
    assert config.language_model.config_overrides.get("hidden_size") == (256 if small else None)
