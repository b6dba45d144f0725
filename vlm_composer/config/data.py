"""The sections of a training yaml about the data: data sets and loaders."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from vlm_composer.config.section import POSITIVE, Name, Section, at_least

ImageDecoder = Literal["torchvision", "pil"]
TAKEN = replace(POSITIVE, fault=f"{POSITIVE.fault}; leave the stream out to take nothing of it")


@dataclass
class StreamConfig(Section):
    """One of several data sets that a loader mixes, and how much of it an epoch takes: at most one
    of `proportion`, `repeat` and `choose`; without any, each sample once."""

    local: str
    """Folder the shards are read from; with `remote`, the cache they are downloaded to. Each stream
    has its own."""
    remote: str | None = None
    """Folder or URL (s3://, gs://, azure://) that the shards are downloaded from."""
    proportion: Annotated[float, TAKEN] | None = None
    """Share of an epoch, relative to those of the other streams, which need one too. The epoch has
    `dataset.epoch_size` samples, or as many as there are: some are left out and others repeated."""
    repeat: Annotated[float, TAKEN] | None = None
    """How often an epoch takes each sample: 2 is twice, 0.5 one half of them."""
    choose: Annotated[int, TAKEN] | None = None
    """Samples that an epoch takes."""

    @property
    def place(self) -> str:
        """Where the shards are: `remote`, or `local` where there is none."""
        return self.remote or self.local

    @property
    def weight(self) -> dict[str, float]:
        """What of `proportion`, `repeat` and `choose` is given."""
        weights = {key: getattr(self, key) for key in ("proportion", "repeat", "choose")}
        return {key: value for key, value in weights.items() if value is not None}


@dataclass
class DatasetConfig(Section):
    """How StreamingDataset reads MDS shards, and where those of one data set are. They hold images
    (`python -m convert`) or features of the vision tower (`python -m convert.features`)."""

    local: str | None = None
    """Folder the shards are read from; with `remote`, the cache they are downloaded to."""
    remote: str | None = None
    """Folder or URL (s3://, gs://, azure://) that the shards are downloaded from."""
    epoch_size: Annotated[int, at_least(1)] | None = None
    """Samples of an epoch; as many as there are when empty. Streams give their `proportion` of it,
    or by their sizes. Not with `repeat` or `choose`, nor for evaluation."""
    sampling_method: Literal["balanced", "fixed"] = "balanced"
    """Where an epoch takes a part of a data set: balanced draws another in every epoch, fixed takes
    the same one."""
    sampling_granularity: Annotated[int, at_least(1)] = 1
    """Samples that such a part takes from a shard at a time: with more, fewer shards are
    downloaded."""
    shuffle: bool = False
    """Shuffle the samples, in a new order in every epoch."""
    shuffle_algo: str = "py1e"
    """StreamingDataset's shuffling algorithm."""
    shuffle_seed: int = 17
    """Seed of the shuffle."""
    shuffle_block_size: int | None = None
    """Samples shuffled together; StreamingDataset's own choice when empty."""
    num_canonical_nodes: Annotated[int, at_least(1)] = 1
    """Parts the samples are divided into before shuffling. 1: no sample is ever repeated and the
    order is the same for any number of nodes, but every node downloads every shard. A multiple of
    the nodes: each downloads its part, and up to that many samples repeat an epoch."""
    predownload: int | None = None
    """Samples to download ahead of a worker; StreamingDataset's own choice when empty."""
    cache_limit: str | int | None = None
    """Most bytes the cache may hold, for example 100gb; no limit when empty."""
    download_timeout: float = 600
    """Seconds that the other ranks of a node wait for the index."""
    validate_hash: str | None = "xxh64"
    """Hash that every shard is checked with before it is read, downloaded or not; empty checks
    sizes only."""


@dataclass
class LoaderConfig(Section):
    """A data loader."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """How samples are read, and where the shards of one data set are."""
    streams: dict[Name, StreamConfig] | None = None
    """Several data sets by name, to be mixed; `dataset` then has no `local` and no `remote`. In
    which order they stand changes nothing."""
    num_workers: Annotated[int, at_least(0)] = 2
    """Processes a rank that read, decode and tokenize."""
    prefetch_factor: Annotated[int, at_least(1)] = 2
    """Batches each of them prepares ahead."""
    drop_last: bool = True
    """Leave out the last batch of an epoch where it is not full (training)."""

    @property
    def sources(self) -> dict[str, StreamConfig]:
        """The data sets that are read, by their keys below the loader's: `streams.NAME` of each
        stream, in order of the names; or `dataset` alone."""
        if self.streams is not None:
            return {f"streams.{name}": self.streams[name] for name in sorted(self.streams)}
        assert self.dataset.local is not None  # the schema's checks have seen to it
        return {"dataset": StreamConfig(self.dataset.local, self.dataset.remote)}


@dataclass
class EvalLoaderConfig(LoaderConfig):
    """The loader of the evaluation set."""

    drop_last: bool = False
    """Must stay false: every sample counts once."""
    mismatched_images: bool = False
    """Also evaluate with the image of the sample half the set away in place of the right one, as
    `metrics/eval_mismatched/…`. The difference is what the language model takes from the image."""
