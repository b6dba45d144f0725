"""Checkpoints of the tests' runs."""

from pathlib import Path

from vlm_composer.training.checkpoint_folder import CheckpointFolder

HOLD = {"save_folder": "{run_folder}/checkpoints", "save_interval": "2ba"}


def folder_of(config):
    return Path(config.folder("{run_folder}/checkpoints"))


def newest(config):
    checkpoint = CheckpointFolder(str(folder_of(config)), folder_of(config)).newest()
    assert checkpoint is not None
    return checkpoint
