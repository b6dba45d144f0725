"""The sections of a training yaml about the data: data sets and loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ImageDecoder = Literal["torchvision", "pil"]


@dataclass
class DatasetConfig:
    """Where MDS shards are and how StreamingDataset reads them. They are of images
    (`python -m convert`) or of what the vision tower makes of them (`python -m convert.features`);
    the shards say which."""

    local: str
    """Folder the shards are read from; with `remote`, the cache they are downloaded to."""
    remote: str | None = None
    """Folder or URL (s3://, gs://, azure://) that the shards are downloaded from."""
    shuffle: bool = False
    """Shuffle the samples anew in every epoch."""
    shuffle_algo: str = "py1e"
    """StreamingDataset's shuffling algorithm."""
    shuffle_seed: int = 17
    """Seed of the shuffle."""
    shuffle_block_size: int | None = None
    """Samples shuffled together; StreamingDataset's own choice when empty."""
    num_canonical_nodes: int = 1
    """Parts the samples are divided into before shuffling. 1: no sample is ever repeated and the
    order is the same for any number of nodes, but every node downloads every shard. A multiple of
    the
    nodes: each downloads its part, and up to that many samples repeat an epoch."""
    predownload: int | None = None
    """Samples to download ahead of a worker."""
    cache_limit: str | int | None = None
    """Most bytes the cache may hold, for example 100gb."""
    download_timeout: float = 600
    """Seconds that the other ranks of a node wait for the index."""
    validate_hash: str | None = "xxh64"
    """Hash that every shard is checked with before it is read, downloaded or not; empty checks
    sizes only."""


@dataclass
class LoaderConfig:
    """A data loader."""

    dataset: DatasetConfig
    num_workers: int = 2
    """Processes a rank that read, decode and tokenize."""
    prefetch_factor: int = 2
    """Batches each of them prepares ahead."""
    drop_last: bool = True
    """Leave out the last batch of an epoch where it is not full (training)."""


@dataclass
class EvalLoaderConfig(LoaderConfig):
    """The loader of the evaluation set."""

    drop_last: bool = False
    """Must stay false: every sample counts once."""
    mismatched_images: bool = False
    """Also evaluate with the image of the sample half the set away in place of the right one, as
    `metrics/eval_mismatched/…`. The difference is what the language model takes from the image."""
