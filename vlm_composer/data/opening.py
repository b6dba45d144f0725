"""Open what a loader of the yaml reads, whichever kind the shards are of: images or features."""

from __future__ import annotations

import logging
from pathlib import Path

from composer.utils import dist

from vlm_composer.config.data import LoaderConfig
from vlm_composer.data.dataset import StreamingCaptions
from vlm_composer.data.stream import CheckedStream
from vlm_composer.mds.index import INDEX_FILE
from vlm_composer.mds.json_object import MAX_JSON_BYTES
from vlm_composer.outages import MissingFileError, best_effort
from vlm_composer.ranks import run_on
from vlm_composer.storage import open_store

log = logging.getLogger(__name__)


def read_of_conversion(place: str, name: str) -> tuple[bytes, str] | None:
    """Read a file that `python -m convert` left above a folder of shards: beside it, or, of sources
    that have names, one folder higher.

    Args:
        place: Folder or URL of the shards.
        name: Of the file, such as `summary.json`.

    Returns:
        Its content, cut after MAX_JSON_BYTES and one, and the shards' folder relative to its own
        (`train`, `llava/train`); None where there is none, or none that can be read: a warning.
    """
    place = place.rstrip("/")
    above = place.rpartition("/")[0]
    for folder in (above, above.rpartition("/")[0]):
        with best_effort(f"read {name} of the data in {folder or '.'}"):
            try:
                content = open_store(folder or ".").read(name, MAX_JSON_BYTES + 1)
            except MissingFileError:
                log.debug("No %s of the data in %s.", name, folder or ".")
                continue
            return content, place[len(folder) :].lstrip("/")
    return None


def open_dataset(
    loader: LoaderConfig, *, batch_size: int, store_timeout: float
) -> StreamingCaptions:
    """Open the shards that a loader's section of the yaml names.

    Args:
        loader: The section.
        batch_size: Samples a batch on one rank.
        store_timeout: Seconds that the store may be away.

    Returns:
        The data set, of all streams where there are several. Its `features` are those of their
        `features.json` where they hold patches.

    Raises:
        ValueError: There are no shards, patches without a `features.json`, or streams of several
            kinds.
        StoreError: The store cannot be used, or the disk has no room for the caches.
    """
    dataset = loader.dataset
    for source in loader.sources.values():
        if source.remote is None and not (Path(source.local) / INDEX_FILE).is_file():
            raise ValueError(
                f"{source.local} holds no MDS shards (no index.json); write them with "
                "`python -m convert`, or set `remote`"
            )
    streams = [
        CheckedStream(
            name=name,
            local=source.local,
            remote=source.remote,
            **source.weight,
            validate_hash=dataset.validate_hash,
            download_timeout=dataset.download_timeout,
            store_timeout=store_timeout,
            check_at_start=dataset.cache_limit is not None,
        )
        for name, source in loader.sources.items()
    ]
    captions = StreamingCaptions(
        streams,
        batch_size=batch_size,
        epoch_size=dataset.epoch_size,
        sampling_method=dataset.sampling_method,
        sampling_granularity=dataset.sampling_granularity,
        shuffle=dataset.shuffle,
        shuffle_algo=dataset.shuffle_algo,
        shuffle_seed=dataset.shuffle_seed,
        shuffle_block_size=dataset.shuffle_block_size,
        num_canonical_nodes=dataset.num_canonical_nodes,
        predownload=dataset.predownload,
        cache_limit=dataset.cache_limit,
    )
    run_on(dist.get_local_rank() == 0, captions.check_disk)
    return captions
