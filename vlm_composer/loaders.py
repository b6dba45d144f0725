"""From the configuration to the loaders: encoder, training and evaluation data, caches."""

from __future__ import annotations

import logging
from typing import Any

import torch
from composer import DataSpec, Evaluator
from composer.utils import dist
from streaming import StreamingDataLoader
from torch.utils.data import DataLoader

from vlm_composer.assembly import vision_settings
from vlm_composer.config import TrainConfig
from vlm_composer.config.data import LoaderConfig
from vlm_composer.data.batches import num_samples, num_tokens, split_batch
from vlm_composer.data.by_index import CaptionsByIndex
from vlm_composer.data.dataset import StreamingCaptions
from vlm_composer.data.encoder import BatchEncoder, Pixels, SampleError
from vlm_composer.data.features import Features
from vlm_composer.data.leftovers import claim_caches, live_as_parent
from vlm_composer.data.mixing import describe_mix, is_mixed
from vlm_composer.data.opening import open_dataset
from vlm_composer.data.template import Template

log = logging.getLogger(__name__)


def assemble_encoder(config: TrainConfig, template: Template) -> BatchEncoder:
    """Make what turns records into batches, for the tower's image size; no weight is read."""
    vision = vision_settings(config)
    return BatchEncoder(template, Pixels(vision.image_size, vision.resample, vision.image_decoder))


def assemble_train_loader(config: TrainConfig, encoder: BatchEncoder, device: str) -> DataSpec:
    """Make the training loader.

    torch.distributed must be initialised where there are several ranks: StreamingDataset asks it.

    Raises:
        ValueError: The set is smaller than one batch.
    """
    batch_size = config.global_train_batch_size // dist.get_world_size()
    captions = _open_dataset(config, config.train_loader, batch_size)
    if config.train_loader.drop_last and captions.epoch_size < config.global_train_batch_size:
        raise ValueError(
            f"train_loader: an epoch of {captions.epoch_size} samples is less than one batch of "
            f"{config.global_train_batch_size} (global_train_batch_size)"
        )
    if is_mixed(captions.mix):
        log.info("Of the training data, %s.", describe_mix(captions.mix))
    if len(captions.mix) > 1 and not captions.shuffle:
        log.warning(
            "train_loader.dataset.shuffle: false, so that the streams are read one after the other."
        )
    loader = StreamingDataLoader(
        captions,
        batch_size=batch_size,
        drop_last=config.train_loader.drop_last,
        **_loader_options(config.train_loader, captions, encoder, device),
    )
    return _data_spec(loader)


def assemble_evaluators(config: TrainConfig, encoder: BatchEncoder, device: str) -> list[Evaluator]:
    """Make the evaluators: `eval`, and `eval_mismatched` where the yaml asks for it."""
    if config.eval_loader is None:
        return []
    batch_size = config.device_eval_batch_size
    if batch_size is None:
        microbatch = config.device_train_microbatch_size
        batch_size = microbatch if isinstance(microbatch, int) else 8
    captions = _open_dataset(config, config.eval_loader, batch_size)
    shifts = {"eval": 0}
    if config.eval_loader.mismatched_images:
        # From half the set away: neighbours in a data set are often alike.
        shifts["eval_mismatched"] = max(captions.num_samples // 2, 1)
    evaluators = []
    for label, shift in shifts.items():
        dataset = CaptionsByIndex(captions, image_shift=shift)
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=dist.get_sampler(dataset, drop_last=False, shuffle=False),
            # Its own, so that an evaluation does not move the generator that training draws from: a
            # run that is stopped during one must resume exactly.
            generator=torch.Generator(),
            **_loader_options(config.eval_loader, captions, encoder, device),
        )
        evaluators.append(
            Evaluator(
                label=label,
                dataloader=_data_spec(loader),
                device_eval_microbatch_size=batch_size,
                subset_num_batches=config.eval_subset_num_batches,
            )
        )
    return evaluators


def explain_failure(error: Exception) -> str | None:
    """Return in one line why a loader could not give a batch.

    torch puts the traceback of a worker into the message of the error that it raises again.

    Args:
        error: What training or an evaluation raised.

    Returns:
        What the user needs to know; None where the error is not a loader's or a store's.
    """
    text = str(error)
    # A worker that dies while it hands over a batch resets the connection.
    died = isinstance(error, ConnectionResetError | EOFError)
    if died or (isinstance(error, RuntimeError) and text.startswith("DataLoader worker")):
        what = f"a loader's worker has died ({text or type(error).__name__})." if died else text
        return (
            f"{' '.join(what.split())} See whether the machine ran out of memory (dmesg); fewer "
            "train_loader.num_workers, or a smaller prefetch_factor, take less"
        )
    if isinstance(error, SampleError | OSError):
        kind = type(error)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        _, raised, message = text.rpartition(f"\n{module}{kind.__qualname__}: ")
        return " ".join((message if raised else text).split())
    return None


def claim_data(config: TrainConfig) -> None:
    """Take this run's caches and free what killed runs hold of them; one rank of a node calls it.

    Raises:
        ValueError: A living run reads into the same cache.
    """
    claim_caches(caches_of(config))


def caches_of(config: TrainConfig) -> list[str]:
    """Folders that this run downloads shards to."""
    sources = [x for loader in config.loaders.values() for x in loader.sources.values()]
    return [source.local for source in sources if source.remote is not None]


def features_of(train: DataSpec, evaluators: list[Evaluator]) -> list[Features]:
    """Collect what the data sets say of their patches; data sets of images say nothing."""
    loaders: list[Any] = [train.dataloader, *(e.dataloader.dataloader for e in evaluators)]
    return [features for x in loaders for features in x.dataset.features.values()]


def _open_dataset(config: TrainConfig, loader: LoaderConfig, batch_size: int) -> StreamingCaptions:
    captions = open_dataset(loader, batch_size=batch_size, store_timeout=config.store_timeout)
    for name, features in captions.features.items():
        features.check_settings(vision_settings(config), loader.sources[name].place)
    return captions


def _loader_options(
    loader: LoaderConfig, captions: StreamingCaptions, encoder: BatchEncoder, device: str
) -> dict[str, Any]:
    features = next(iter(captions.features.values()), None)  # alike in all streams
    workers = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": True}
    return {
        "num_workers": loader.num_workers,
        "worker_init_fn": live_as_parent,
        "collate_fn": encoder.reading(features),
        "pin_memory": device == "gpu",
        **(workers if loader.num_workers else {}),
    }


def _data_spec(loader: DataLoader[Any]) -> DataSpec:
    return DataSpec(
        loader,
        split_batch=split_batch,
        get_num_samples_in_batch=num_samples,
        get_num_tokens_in_batch=num_tokens,
    )
