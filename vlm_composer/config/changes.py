"""Which settings of a resumed run are not those that it was started with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_composer.config.train_config import TrainConfig

_FREE = (
    "variables",
    "run_name",
    "run_folder",
    "vision_tower.name",  # the towers are compared by what is in them
    "language_model.name",
    "train_loader.dataset.local",
    "train_loader.dataset.remote",
    "train_loader.dataset.epoch_size",
    "train_loader.streams",  # the data by their fingerprint, which is more exact
    "train_loader.dataset.predownload",
    "train_loader.dataset.cache_limit",
    "train_loader.dataset.download_timeout",
    "train_loader.dataset.validate_hash",
    "train_loader.num_workers",
    "train_loader.prefetch_factor",
    "device",
    "device_train_microbatch_size",
    "parallelism",
    "fsdp_config",
    "eval_",
    "device_eval_batch_size",
    "callbacks",
    "loggers",
    "save_",
    "store_timeout",
    "autoresume",
    "load_",
    "progress_bar",
    "log_to_console",
    "console_log_interval",
    "dist_timeout",
)
"""How the keys start that change no weight."""


_ORDER = (
    "global_train_batch_size",
    "train_loader.dataset.num_canonical_nodes",
    "train_loader.dataset.sampling_",
    "train_loader.dataset.shuffle",
)
"""How the keys start that decide which samples the rest of an epoch reads, in which batches. The
data themselves are compared by their fingerprint."""


def changed_order(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Compare as `changed_settings` does; return the lines of settings that may change only between
    epochs."""
    return [line for line in differences(saved, config.recorded()) if line.startswith(_ORDER)]


def changed_settings(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Compare a checkpoint's settings with a run's.

    Args:
        saved: What `recorded` gave of the configuration that the checkpoint was saved under.
        config: This run's.

    Returns:
        A line for each setting that changes what the run computes, with both values.
    """
    return [line for line in differences(saved, config.recorded()) if not line.startswith(_FREE)]


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return `key: value became value` for each dotted key whose values differ."""
    before, now = dict(_flat(saved)), dict(_flat(here))
    return [
        f"{key}: {before.get(key)} became {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
