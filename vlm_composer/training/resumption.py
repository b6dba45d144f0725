"""Go on from a checkpoint, in the middle of an epoch, as if the run had never stopped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

from vlm_composer.config import TrainConfig
from vlm_composer.config.changes import changed_settings
from vlm_composer.ranks import on_rank_zero, run_on
from vlm_composer.training.checkpoint_file import CheckpointError, CheckpointFile
from vlm_composer.training.checkpoint_folder import CheckpointFolder, open_named
from vlm_composer.training.checkpoint_state import (
    check_data,
    check_fits,
    check_order,
    restore_progress,
    restore_weights,
)
from vlm_composer.training.exported_connector import ExportedConnector
from vlm_composer.training.towers_identity import Identity, check_towers

log = logging.getLogger(__name__)


class Resumption(NamedTuple):
    """A checkpoint to start from. Rank 0 has the file; every rank has its document."""

    document: dict[str, Any]
    weights_only: bool
    folder: CheckpointFolder | None
    checkpoint: CheckpointFile | None


def open_save_folder(config: TrainConfig) -> CheckpointFolder | None:
    """Open the run's checkpoints on rank 0; the preflight has seen that they can be written.

    With `save_overwrite` it deletes what is there. The other ranks, and a run that saves nothing,
    get None.

    Raises:
        StoreError: The folder or bucket cannot be used.
        CheckpointError: It has checkpoints, and nothing says what to do with them.
    """
    if config.save_folder is None:
        return None
    url = config.folder(config.save_folder)

    def open_and_check() -> CheckpointFolder:
        folder = CheckpointFolder(
            url,
            _scratch(config),
            store_timeout=config.store_timeout,
            keep=config.save_num_checkpoints_to_keep,
        )
        check_free(config, url, folder.names())
        folder.abort_uploads()
        if config.save_overwrite:
            folder.clear()
        return folder

    return run_on(dist.get_global_rank() == 0, open_and_check)


def check_free(config: TrainConfig, url: str, names: Sequence[str]) -> None:
    """Refuse the checkpoints of another run where nothing says what to do with them.

    Args:
        config: The run.
        url: Its `save_folder`, filled in.
        names: Of the checkpoints there, the newest first.

    Raises:
        CheckpointError: There are some.
    """
    if names and not (config.save_overwrite or config.autoresume):
        number = "1 checkpoint" if len(names) == 1 else f"{len(names)} checkpoints"
        raise CheckpointError(
            f"{url} already holds {number}, the newest is {names[0]}; set "
            "autoresume: true to go on from it, save_overwrite: true to delete them, or choose "
            "another folder"
        )


def find_resumption(config: TrainConfig, saved: CheckpointFolder | None) -> Resumption | None:
    """Open the checkpoint to start from: the newest of `save_folder` with `autoresume`, else
    `load_path`.

    Raises:
        CheckpointError: It is damaged, not a checkpoint of this project, or inside an epoch that
            would be read otherwise with this run's settings.
        OSError: It cannot be read.
    """
    found: list[tuple[CheckpointFolder, CheckpointFile]] = []

    def look() -> tuple[dict[str, Any], bool] | None:
        if config.autoresume and saved is not None and (newest := saved.newest()):
            found.append((saved, newest))
            check_order(newest.document, config, newest.url)
            return newest.document, False
        if config.load_path is None:
            return None
        path = config.folder(config.load_path)
        found.append(open_named(path, _scratch(config), config.store_timeout))
        if isinstance(found[0][1], ExportedConnector) and not config.load_weights_only:
            raise CheckpointError(
                f"load_path: {found[0][1].url} is an export, which has no optimizer and no "
                "position; set load_weights_only: true to start from its connector"
            )
        if not config.load_weights_only:
            check_order(found[0][1].document, config, found[0][1].url)
        return found[0][1].document, config.load_weights_only

    result = on_rank_zero(look)
    if result is None:
        return None
    folder, checkpoint = found[0] if found else (None, None)
    return Resumption(*result, folder, checkpoint)


def resume(trainer: Trainer, resumption: Resumption, config: TrainConfig, towers: Identity) -> None:
    """Load a checkpoint into a Trainer that has not trained yet.

    Args:
        trainer: As `build_trainer` made it.
        resumption: What to load.
        config: The run; settings that differ from the checkpoint's are logged.
        towers: Those of this run.

    Raises:
        CheckpointError: The checkpoint is of another connector, other towers or other data.
    """
    state, checkpoint = trainer.state, resumption.checkpoint

    def check() -> None:
        assert checkpoint is not None
        check_fits(state, checkpoint)
        check_towers(checkpoint.document["towers"], towers, checkpoint.url)
        if not resumption.weights_only:
            check_data(state, checkpoint)

    run_on(checkpoint is not None, check)
    restore_weights(state, checkpoint)
    document = resumption.document
    if resumption.weights_only:
        log.info("Took the connector's weights from a checkpoint; everything else starts anew.")
    else:
        generators = restore_progress(state, checkpoint, document)
        for line in changed_settings(document["settings"], config):
            log.warning("Resuming with another setting: %s", line)
        restorer = RestoreRNG(generators)
        restorer.init(state, trainer.logger)
        state.callbacks.append(restorer)
        log.info(
            "Resuming after batch %d (epoch %d, sample %d of it).",
            state.timestamp.batch.value,
            state.timestamp.epoch.value,
            state.timestamp.sample_in_epoch.value,
        )
    if resumption.folder is not None and checkpoint is not None:
        resumption.folder.done_with(checkpoint)


class RestoreRNG(Callback):
    """Puts the random generators where they were when the checkpoint was saved.

    Between epochs that is before the data loader draws its seed, within one it is after. Composer
    0.32.1 does not do the second for a StreamingDataset.

    Args:
        generators: The state of every rank, as Composer's `load_rng_state` takes it.
    """

    def __init__(self, generators: list[dict[str, Any]]) -> None:
        self._generators: list[dict[str, Any]] | None = generators

    def fit_start(self, state: State, logger: Logger) -> None:
        """Restore between epochs."""
        del logger
        if state.timestamp.batch_in_epoch == 0:
            self._restore()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Restore within an epoch, before its next batch."""
        del state, logger
        self._restore()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Restore after an epoch's last batch, where there was none left."""
        del state, logger
        self._restore()

    def _restore(self) -> None:
        if self._generators is not None:
            reproducibility.load_rng_state(self._generators)
            self._generators = None


def _scratch(config: TrainConfig) -> Path:
    return Path(config.folder("{run_folder}/scratch"))
