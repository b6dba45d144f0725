"""What is known of the run that a checkpoint is of: for an export's card and its facts file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_composer.config import TrainConfig
from vlm_composer.data.schema import IMAGE_PLACEHOLDER
from vlm_composer.mds.json_object import MAX_JSON_BYTES, parse_object
from vlm_composer.training.metrics_file import read_metrics

DEFAULT_PROMPT = f"{IMAGE_PLACEHOLDER}\nDescribe the image concisely."
"""Asked where the prompts of the training are not known; one of LLaVA-Pretrain's."""
QUALITY_FILE = "quality.json"
_CUT_AT = 200
"""Characters of a prompt that it counts by: a longer one is not known in full."""
_LOSSES = {
    "loss/train/total": "training loss of the last batch",
    "metrics/eval/LanguageCrossEntropy": "evaluation loss",
    "metrics/eval_mismatched/LanguageCrossEntropy": "evaluation loss with wrong images",
    "evidence/gap_wrong": "worth of the right image against another one (nats a token)",
    "evidence/retrieval_accuracy": "retrieval accuracy",
    "evidence/retrieval_chance": "retrieval accuracy of chance",
}


def run_facts(document: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Collect what a checkpoint says of its run, and the run's metrics where they are at hand.

    Args:
        document: Of the checkpoint.
        config: The run's.

    Returns:
        `run_name`, `batches`, `epochs`, `samples_in_epoch`, `global_train_batch_size`,
        `max_duration`, `seed`, `optimizer`, `scheduler`, `precision`, `max_seq_len`,
        `image_decoder`, `data` (names, samples, hash), `metrics` (name → value; may be empty) and
        `versions`.
    """
    settings, timestamp = document["settings"], document["timestamp"]
    copied = (
        *("run_name", "global_train_batch_size", "max_duration", "seed", "optimizer"),
        *("scheduler", "precision", "max_seq_len", "image_decoder"),
    )
    return {
        **{key: settings.get(key) for key in copied},
        "batches": timestamp["batch"],
        "epochs": timestamp["epoch"],
        "samples_in_epoch": timestamp["sample_in_epoch"],
        "data": {"names": list(_places(settings)), **document["data"]},
        "metrics": metrics_at(config, timestamp["batch"]),
        "versions": document["versions"],
    }


def metrics_at(config: TrainConfig, batch: int) -> dict[str, float]:
    """The last values up to a batch of what tells how well a run went; empty where its metrics file
    is not here."""
    if config.loggers.jsonl is None:
        return {}
    path = Path(config.folder(config.loggers.jsonl.path))
    if not path.is_file():
        return {}
    logged, found = read_metrics(path), {}
    for name, words in _LOSSES.items():
        if values := [value for at, value in logged.get(name, []) if at <= batch]:
            found[words] = values[-1]
    return found


def commonest_prompt(settings: Mapping[str, Any]) -> str | None:
    """Return the commonest prompt of the training data, by the quality.json that its conversion
    left; None where there is none of that name.

    Args:
        settings: Those of a checkpoint. Whoever wrote it chose the places, so no shard is opened
            there and no store is asked: a text of one small file is taken, or nothing.
    """
    for place in _places(settings):
        if not isinstance(place, str) or "://" in place:
            continue
        # The folder of the sides, or the one above the sources.
        for folder in list(Path(place).parents)[:2]:
            if prompt := _prompt_of(folder / QUALITY_FILE):
                return prompt
    return None


def _prompt_of(path: Path) -> str | None:
    """The first prompt of a quality.json, where it is one to ask."""
    try:
        # A pipe or a device would be waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            prompts = parse_object(file.read(MAX_JSON_BYTES + 1))["prompts"]
        prompt = prompts[0]["prompt"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    if not isinstance(prompt, str) or prompt.count(IMAGE_PLACEHOLDER) != 1:
        return None
    return prompt if len(prompt) < _CUT_AT else None


def _places(
    settings: Mapping[str, Any], keys: tuple[str, ...] = ("remote", "local")
) -> Iterator[str]:
    """Where the training data is; of each data set the first of `keys` that is given."""
    dataset = settings["train_loader"]["dataset"]
    streams = dataset.get("streams") or [dataset]
    for stream in streams.values() if isinstance(streams, Mapping) else streams:
        if places := [stream[key] for key in keys if stream.get(key)]:
            yield places[0]
