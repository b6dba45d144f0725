"""One run at a time writes to a run folder and to a local folder of checkpoints.

A bucket has no locks: of two runs with one `save_folder` there, each saves whole checkpoints, and
the last one written under a name stays.
"""

from __future__ import annotations

from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

from vlm_composer.config import TrainConfig
from vlm_composer.locks import check_free, hold, let_go

LOCK_FILE = ".vlm_composer.lock"
_ADVICE = "end that run, or give this one a run_folder and a save_folder of its own"


def check_ownership(config: TrainConfig) -> None:
    """Raise ValueError where another process holds a folder that rank 0 of the run writes to."""
    for folder in _folders(config):
        check_free(folder / LOCK_FILE, str(folder), _ADVICE)


def take_ownership(config: TrainConfig) -> None:
    """Lock the folders that rank 0 of the run writes to, until the Trainer closes or the process
    ends.

    Raises:
        ValueError: Another process holds one of them and does not end.
        OSError: A folder cannot be made or written.
    """
    for folder in _folders(config):
        folder.mkdir(parents=True, exist_ok=True)
        hold(folder / LOCK_FILE, str(folder), _ADVICE)


class ReleaseFolders(Callback):
    """Unlocks what `take_ownership` has locked when the Trainer closes.

    Args:
        config: The run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._folders = _folders(config)

    def close(self, state: State, logger: Logger) -> None:
        del state, logger
        for folder in self._folders:
            let_go(folder / LOCK_FILE)


def _folders(config: TrainConfig) -> list[Path]:
    folders = [config.folder("{run_folder}")]
    if config.save_folder is not None and "://" not in config.save_folder:
        folders.append(config.folder(config.save_folder))
    return [Path(folder).resolve() for folder in folders]
