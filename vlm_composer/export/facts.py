"""What is known of the run that a checkpoint is of: for an export's card and its facts file."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_composer.config import TrainConfig
from vlm_composer.config.data import LoaderConfig, StreamConfig
from vlm_composer.config.loader import build
from vlm_composer.data.schema import IMAGE_PLACEHOLDER
from vlm_composer.mds.json_object import MAX_JSON_BYTES, parse_object
from vlm_composer.training.checkpoint_file import CheckpointFile
from vlm_composer.training.metrics_file import read_metrics

log = logging.getLogger(__name__)

DEFAULT_PROMPT = f"{IMAGE_PLACEHOLDER}\nDescribe the image concisely."
"""Asked where the prompts of the training are not known; one of LLaVA-Pretrain's."""
COPIED = (
    *("run_name", "global_train_batch_size", "max_duration", "seed", "optimizer"),
    *("scheduler", "precision", "max_seq_len", "image_decoder"),
)
"""Settings that a card shows."""
CUT = 200
"""Characters at which `quality.json` cuts a prompt."""
_QUALITY = "quality.json"
_LOSSES = {
    "loss/train/total": "training loss of the last batch",
    "metrics/eval/LanguageCrossEntropy": "evaluation loss",
    "metrics/eval_mismatched/LanguageCrossEntropy": "evaluation loss with wrong images",
    "evidence/gap_wrong": "worth of the right image against another one (nats a token)",
    "evidence/retrieval_accuracy": "retrieval accuracy",
    "evidence/retrieval_chance": "retrieval accuracy of chance",
}


def run_facts(checkpoint: CheckpointFile, config: TrainConfig, *, is_users: bool) -> dict[str, Any]:
    """Collect what a checkpoint says of its run, and the run's metrics where they are at hand.

    Args:
        checkpoint: The checkpoint.
        config: The run's.
        is_users: The configuration is a yaml that the user named; a checkpoint's own may be
            anybody's.

    Returns:
        `run_name`, `batches`, `epochs`, `samples_in_epoch`, `global_train_batch_size`,
        `max_duration`, `seed`, `optimizer`, `scheduler`, `precision`, `max_seq_len`,
        `image_decoder`, `data` (names, samples, hash), `metrics` (name → value; may be empty) and
        `versions`.
    """
    document = checkpoint.document
    settings, timestamp = document["settings"], document["timestamp"]
    names = [source.place for source in trained_on(document, config).sources.values()]
    return {
        **{key: settings.get(key) for key in COPIED},
        "batches": timestamp["batch"],
        "epochs": timestamp["epoch"],
        "samples_in_epoch": timestamp["sample_in_epoch"],
        "data": {"names": names, **document["data"]},
        "metrics": metrics_at(config, checkpoint, is_users=is_users),
        "versions": document["versions"],
    }


def trained_on(document: Mapping[str, Any], config: TrainConfig) -> LoaderConfig:
    """Return the loader that a checkpoint was trained with.

    Args:
        document: Of the checkpoint.
        config: The run's; its loader is taken where this version does not know the checkpoint's.
    """
    errors: list[str] = []
    loader = build(LoaderConfig, document["settings"]["train_loader"], "train_loader", errors)
    return loader or config.train_loader


def metrics_at(
    config: TrainConfig, checkpoint: CheckpointFile, *, is_users: bool
) -> dict[str, float]:
    """Read the last values up to a checkpoint of what tells how well its run went.

    The path that a checkpoint's settings name is followed only beside the checkpoint.

    Args:
        config: The run's.
        checkpoint: The checkpoint.
        is_users: As `run_facts`'s.

    Returns:
        Name → value; empty where the metrics file is not here or is not read.
    """
    batch = checkpoint.document["timestamp"]["batch"]
    path = _metrics_file(config, checkpoint, is_users)
    if path is None:
        return {}
    try:
        logged = read_metrics(path)
    except OSError as error:
        log.warning("%s cannot be read: %s; the card has no metrics.", path, error)
        return {}
    found = {}
    for name, words in _LOSSES.items():
        if values := [value for at, value in logged.get(name, []) if at <= batch]:
            found[words] = values[-1]
    return found


def _metrics_file(config: TrainConfig, checkpoint: CheckpointFile, is_users: bool) -> Path | None:
    """The run's metrics file, in the checkpoint's folder or in the one above it."""
    if config.loggers.jsonl is None:
        return None
    path = Path(config.folder(config.loggers.jsonl.path))
    try:
        if not path.is_file():
            return None
        folder = checkpoint.path.parent.resolve()
        beside = "://" not in checkpoint.url and path.resolve().parent in (folder, folder.parent)
    except (OSError, ValueError):  # ValueError: no file can have such a name
        return None
    if is_users or beside:
        return path
    log.warning(
        "The metrics file %s that %s names is not beside it and is not read; give the run's yaml "
        "with --yaml for a card with metrics.", path, checkpoint.url,
    )  # fmt: skip
    return None


def commonest_prompt(loader: LoaderConfig) -> tuple[str | None, str]:
    """Return the prompt that an epoch of the training data asks most often.

    Args:
        loader: The loader of the training data.

    Returns:
        The prompt, by the `quality.json` of the data sets' conversions, and where it is from; or
        None and why it is not known.
    """
    counts: Counter[str] = Counter()
    seen: dict[bytes, str] = {}
    for name, source in loader.sources.items():
        quality = _quality_of(source.place)
        if quality is None:
            return None, f"{source.place} has no {_QUALITY} of its conversion on this machine"
        try:
            content = parse_object(quality)
            weight = _samples_taken(source, content)
            prompts = {one["prompt"]: weight * one["samples"] for one in content["prompts"]}
            if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
                raise TypeError("its prompts are not texts")
        except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            return None, f"the {_QUALITY} of {source.place} cannot be read ({error!r})"
        if quality in seen and any(one.weight for one in loader.sources.values()):
            return None, (
                f"{seen[quality]} and {name} are of one conversion, whose {_QUALITY} does not say "
                "which prompts are whose"
            )
        if quality not in seen:
            counts.update(prompts)
        seen[quality] = name
    prompt = counts.most_common(1)[0][0] if counts else ""
    if prompt.count(IMAGE_PLACEHOLDER) != 1 or len(prompt) >= CUT:
        return None, f"the commonest prompt is cut in {_QUALITY}: {prompt[:60]!r}"
    return prompt, "the commonest of the training data"


def _samples_taken(source: StreamConfig, quality: Mapping[str, Any]) -> float:
    """Weight of a sample of a data set in an epoch; shares are relative to each other."""
    if source.repeat is not None:
        return source.repeat
    taken = source.choose if source.choose is not None else source.proportion
    return 1.0 if taken is None else taken / quality["samples"]


def _quality_of(place: str) -> bytes | None:
    """The quality.json of a data set; of features that of the images that they are made of."""
    if quality := _beside(place, _QUALITY):
        return quality
    try:
        sources = parse_object(_beside(place, "summary.json") or b"")["sources"]
        return _beside(str(sources[Path(place).name]["from"]), _QUALITY)
    except (ValueError, TypeError, KeyError):  # not of features
        return None


def _beside(place: str, name: str) -> bytes | None:
    """A small file of the folder above a data set's sides or sources.

    Whoever wrote a checkpoint chose the places: no store is asked, and no shard opened.
    """
    if "://" in place:
        return None
    for folder in list(Path(place).parents)[:2]:
        try:
            # A pipe or a device would be waited for.
            with open(os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return file.read(MAX_JSON_BYTES + 1)
        except (OSError, ValueError):  # ValueError: no file can have such a name
            continue
    return None
