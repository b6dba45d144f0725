"""Open a data set of the yaml, whichever kind its shards are of: images or features of images."""

from __future__ import annotations

from pathlib import Path

from composer.utils import dist

from vlm_composer.config.data import DatasetConfig
from vlm_composer.data.dataset import Encoder, StreamingCaptions
from vlm_composer.data.stream import CheckedStream
from vlm_composer.ranks import run_on


def open_dataset(
    dataset: DatasetConfig, encoder: Encoder, *, batch_size: int, store_timeout: float
) -> StreamingCaptions:
    """Open the shards that a section of the yaml names.

    Args:
        dataset: The section.
        encoder: Turns a record into what a batch is made of.
        batch_size: Samples a batch on one rank.
        store_timeout: Seconds that the store may be away.

    Returns:
        The data set. Its `features` are those of its `features.json` where it holds patches.

    Raises:
        ValueError: There are no shards, or patches without a `features.json`.
        StoreError: The store cannot be used, or the disk has no room for the cache.
    """
    if dataset.remote is None and not (Path(dataset.local) / "index.json").is_file():
        raise ValueError(
            f"{dataset.local} holds no MDS shards (no index.json); write them with "
            "`python -m convert`, or set `remote`"
        )
    stream = CheckedStream(
        local=dataset.local,
        remote=dataset.remote,
        validate_hash=dataset.validate_hash,
        download_timeout=dataset.download_timeout,
        store_timeout=store_timeout,
        check_at_start=dataset.cache_limit is not None,
    )
    captions = StreamingCaptions(
        encoder,
        stream,
        batch_size=batch_size,
        shuffle=dataset.shuffle,
        shuffle_algo=dataset.shuffle_algo,
        shuffle_seed=dataset.shuffle_seed,
        shuffle_block_size=dataset.shuffle_block_size,
        num_canonical_nodes=dataset.num_canonical_nodes,
        predownload=dataset.predownload,
        cache_limit=dataset.cache_limit,
    )
    if dataset.remote is not None:
        run_on(dist.get_local_rank() == 0, captions.check_disk)
    return captions
