"""Shards: there, whole by their sizes, of the kind that is read, and enough of them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_composer.config import TrainConfig
from vlm_composer.config.checks import warmup_faults
from vlm_composer.config.data import StreamConfig
from vlm_composer.data.features import Features, VisionSettings, check_alike
from vlm_composer.data.mixing import Mix, describe_mix, epoch_size, is_mixed, mix_of
from vlm_composer.data.schema import MDS_COLUMNS
from vlm_composer.mds.index import FEATURES_FILE, INDEX_FILE, Index, read_index
from vlm_composer.mds.json_object import MAX_JSON_BYTES
from vlm_composer.outages import StoreError, ride_out
from vlm_composer.preflight.finding import Findings, counted
from vlm_composer.storage import Store, open_store

_NAMED = 3
"""How many names of missing files a message has."""


@dataclass(frozen=True)
class Shards:
    """What the index of a data set says.

    Attributes:
        store: Where they are.
        samples: Of all shards.
        columns: Column name → MDS encoding.
        files: Names of the files at `place` and their bytes.
        cached: Names of the files that a cache of them keeps, and their bytes.
        largest: Bytes of the largest shard while it is fetched, compressed and not.
        hashes: Kinds of hash that every file has.
        index: The text itself, to tell one data set from another.
        features: What the patches are, where it holds patches in place of images.
    """

    store: Store
    samples: int
    columns: Mapping[str, str]
    files: Mapping[str, int]
    cached: Mapping[str, int]
    largest: int
    hashes: frozenset[str]
    index: bytes
    features: Features | None = None

    @property
    def place(self) -> str:
        """Folder or URL of the shards."""
        return self.store.url


Side = Mapping[str, Shards]
"""The data sets of a loader whose index could be read, by their keys in `LoaderConfig.sources`."""


def read_shards(source: StreamConfig, seconds: float) -> Shards:
    """Read the index of a data set, and no shard.

    Args:
        source: Where it is.
        seconds: How long the store may be away.

    Raises:
        ValueError: There is none, or it cannot be used.
        StoreError: The store cannot be used.
    """
    place = source.place
    if source.remote is None and not Path(place, INDEX_FILE).is_file():
        raise ValueError(
            f"{place} holds no MDS shards (no index.json); write them with `python -m convert`, "
            "or set `remote`"
        )
    store = open_store(place)
    with tempfile.TemporaryDirectory() as folder:
        path = _fetch(store, INDEX_FILE, Path(folder), seconds)
        index = read_index(path, f"{place}/{INDEX_FILE}")
        described = _describe(store, index, path.read_bytes(), zipped=source.remote is not None)
        if "patches" in index.columns:
            path = _fetch(store, FEATURES_FILE, Path(folder), seconds)
            features = Features.read(path, f"{place}/{FEATURES_FILE}")
            features.check_index(index, place)
            return replace(described, features=features)
        return described


def mix_of_side(config: TrainConfig, side: str, shards: Side) -> Mix | None:
    """What an epoch takes of a side's data sets; None where the index of one could not be read."""
    loader = config.loaders[side]
    if loader.sources.keys() != shards.keys():
        return None
    return mix_of(loader, {key: found.samples for key, found in shards.items()})


def check_side(
    config: TrainConfig, side: str, shards: Side, vision: VisionSettings | None, seconds: float
) -> Findings:
    """Compare what is there with the indexes, and the indexes with what is read.

    Args:
        config: The run.
        side: "train" or "eval".
        shards: Of that side.
        vision: How the run's vision tower sees an image; None where that is not known.
        seconds: How long the store may be away.
    """
    found = Findings()
    for one in shards.values():
        found += _check_shards(config, side, one, vision, seconds)
    with found.failing():
        check_alike({one.place: one.features for one in shards.values()})
    mix = mix_of_side(config, side, shards)
    if mix is None:
        return found
    if is_mixed(mix):
        found.ok(f"{side}: {describe_mix(mix)}")
    for key in (key for key, part in mix.items() if not part.taken):
        found.fail(
            f"{side}_loader.{key}: an epoch of {epoch_size(mix)} samples takes none of it",
            "give it more, or leave it out",
        )
    size, batch = epoch_size(mix), config.global_train_batch_size
    if side == "train" and config.train_loader.drop_last and size < batch:
        found.fail(
            f"train_loader: an epoch of {size} samples is less than one batch of {batch} "
            "(global_train_batch_size)",
            f"set {size} or less, or drop_last: false",
        )
    elif side == "train":
        batches = size / batch
        whole = math.floor(batches) if config.train_loader.drop_last else math.ceil(batches)
        for fault in warmup_faults(config, whole):
            found.fail(fault)
    return found


def _check_shards(
    config: TrainConfig, side: str, shards: Shards, vision: VisionSettings | None, seconds: float
) -> Findings:
    found = Findings()
    _compare_files(found, side, shards, seconds)
    wanted = dict(MDS_COLUMNS)
    if shards.features is not None:
        wanted = shards.features.columns
        with found.failing():
            if vision is not None:
                shards.features.check_settings(vision, shards.place)
    if {name: shards.columns.get(name) for name in wanted} != wanted:
        found.fail(
            f"{side}: {shards.place} has the columns {_columns(shards.columns)}, and "
            f"{_columns(wanted)} are read",
            "write the shards with `python -m convert`",
        )
    hash_kind = config.loaders[side].dataset.validate_hash
    if hash_kind and hash_kind not in shards.hashes:
        found.fail(
            f"validate_hash: {hash_kind}, but the index of {shards.place} has "
            f"{', '.join(sorted(shards.hashes)) or 'no hashes'}",
            "set one of those, or null to check sizes only",
        )
    return found


def check_sides(train: Side, evaluation: Side) -> Findings:
    """See that the sets of training and of evaluation are two."""
    found = Findings()
    for theirs in evaluation.values():
        for ours in train.values():
            if ours.index == theirs.index:
                found.warn(
                    f"train and eval read the same shards ({ours.place}, {theirs.place}): the "
                    "evaluation says nothing of unseen samples",
                    "point eval_loader at the other side of the conversion",
                )
    samples = [sum(shards.samples for shards in side.values()) for side in (train, evaluation)]
    if not found and samples[0] < samples[1]:
        found.warn(
            f"eval has {samples[1]:,} samples and train {samples[0]:,}",
            "see whether the two were mixed up",
        )
    return found


def _compare_files(found: Findings, side: str, shards: Shards, seconds: float) -> None:
    try:
        there = ride_out(shards.store.sizes, f"list {shards.place}", seconds)
    except StoreError as error:
        found.warn(
            f"{side}: the shards' sizes are not known: {error}",
            "allow listing the bucket, or see to it that every shard is there",
        )
        return
    missing = [name for name in shards.files if name not in there]
    wrong = [name for name, size in shards.files.items() if there.get(name, size) != size]
    again = "upload or convert them again"
    if missing:
        found.fail(
            f"{side}: {len(missing)} of {len(shards.files)} shards are missing from "
            f"{shards.place}: {_names(missing)}",
            again,
        )
    if wrong:
        sizes = (f"{n} has {there[n]} bytes, the index says {shards.files[n]}" for n in wrong)
        found.fail(
            f"{side}: {len(wrong)} of {len(shards.files)} shards of {shards.place} are not what "
            f"the index says: {_names(list(sizes))}",
            again,
        )
    if not missing and not wrong:
        kind = "patches" if shards.features else "images"
        number = counted(len(shards.files), "shard")
        found.ok(
            f"{side}: {shards.samples:,} samples ({kind}) in {number} of {shards.place}, all there "
            "with their sizes"
        )


def _describe(store: Store, index: Index, text: bytes, *, zipped: bool) -> Shards:
    """Sum up an index; `zipped` where compressed files are what is looked for."""
    raw = [shard.raw for shard in index.shards]
    stored = [shard.stored for shard in index.shards] if zipped else raw
    return Shards(
        store=store,
        samples=index.samples,
        columns=index.columns,
        files={file.basename: file.bytes for file in stored},
        cached={file.basename: file.bytes for file in raw},
        largest=max(
            shard.raw.bytes + (shard.zipped.bytes if shard.zipped else 0) for shard in index.shards
        ),
        hashes=frozenset.intersection(*(frozenset(file.hashes) for file in (*raw, *stored))),
        index=text,
    )


def _fetch(store: Store, name: str, folder: Path, seconds: float) -> Path:
    """Download a file to a folder."""
    path = folder / name
    what = f"download {store.url}/{name}"
    ride_out(lambda: store.get(name, path, MAX_JSON_BYTES), what, seconds)
    return path


def _columns(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({encoding})" for name, encoding in columns.items())


def _names(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
