"""Which settings of a resumed run are not those that it was started with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from vlm_composer.config.run import TrainConfig

_FREE = (
    "variables",
    "run_name",
    "run_folder",
    "vision_tower.name",  # the towers are compared by what is in them
    "language_model.name",
    "train_loader.dataset.local",
    "train_loader.dataset.remote",  # the data by its index
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


def changed_settings(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Compare a checkpoint's settings with a run's.

    Args:
        saved: `asdict` of the configuration that the checkpoint was saved under, out of JSON.
        config: This run's.

    Returns:
        A line for each setting that changes what the run computes, with both values.
    """
    before, now = dict(_flat(saved)), dict(_flat(asdict(config)))
    return [
        f"{key}: {before.get(key)} became {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_FREE)
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
