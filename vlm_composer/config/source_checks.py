"""Mistakes in what the loaders read: where it is, and how much of it an epoch takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import combinations

from vlm_composer.config.data import LoaderConfig, StreamConfig
from vlm_composer.config.run import RunSettings


def source_mistakes(config: RunSettings) -> list[str]:
    """Return one line for each mistake, with the values and what to do."""
    loaders = {f"{side}_loader": loader for side, loader in config.loaders.items()}
    if misplaced := [line for key, loader in loaders.items() for line in _places(key, loader)]:
        return misplaced  # what is read is not known
    found = list(_shared_folders(loaders))
    for key, loader in loaders.items():
        amounts = _weights if loader is config.train_loader else _every_sample_once
        found += [*amounts(key, loader), *_without_effect(key, loader)]
    return found


def _places(key: str, loader: LoaderConfig) -> Iterator[str]:
    """Both ways to say where the data are, or none."""
    dataset, streams = loader.dataset, loader.streams
    if streams is None and dataset.local is None:
        yield f"{key}.dataset.local: missing; give it, or {key}.streams for several data sets"
    if streams is not None and not streams:
        yield f"{key}.streams: has no stream; name one, or give {key}.dataset.local instead"
    for name, place in (("local", dataset.local), ("remote", dataset.remote)):
        if streams and place is not None:
            yield (
                f"{key}.dataset.{name}: {place}, and {key}.streams with {', '.join(streams)}; give "
                "one of the two"
            )


def _weights(key: str, loader: LoaderConfig) -> Iterator[str]:
    """How much of each an epoch takes, as streaming would refuse it, or worse."""
    sources, size = loader.sources, loader.dataset.epoch_size
    for name, source in sources.items():
        if len(source.weight) > 1:
            yield f"{key}.{name}: {_told(source)}; give one of them"
    with_share = [name for name, source in sources.items() if "proportion" in source.weight]
    without = [name for name in sources if name not in with_share]
    if with_share and without:
        one, other = with_share[0], without[0]
        yield (
            f"{key}: {_told(sources[one])} for {one}, and {_told(sources[other])} for {other}; "
            "give every stream a proportion, or none"
        )
    for name in without if size is not None else ():
        if sources[name].weight:
            yield (
                f"{key}.dataset.epoch_size: {size}, and {_told(sources[name])} for {name}, which "
                "says it too; give proportions, or remove it"
            )


def _every_sample_once(key: str, loader: LoaderConfig) -> Iterator[str]:
    once = "but every evaluation sample counts once; remove it"
    for name, source in loader.sources.items():
        for kind, value in source.weight.items():
            yield f"{key}.{name}.{kind}: {value}, {once}"
    if loader.dataset.epoch_size is not None:
        yield f"{key}.dataset.epoch_size: {loader.dataset.epoch_size}, {once}"


def _without_effect(key: str, loader: LoaderConfig) -> Iterator[str]:
    dataset = loader.dataset
    weights = [source.weight for source in loader.sources.values()]
    weighted = dataset.epoch_size is not None or any(weights)
    for name, value, default in (
        ("sampling_method", dataset.sampling_method, "balanced"),
        ("sampling_granularity", dataset.sampling_granularity, 1),
    ):
        if value != default and not weighted:
            yield (
                f"{key}.dataset.{name}: {value} has no effect where an epoch takes every sample "
                "once; remove it"
            )
    if dataset.cache_limit is None:
        return
    for name, source in loader.sources.items():
        if source.remote is None:
            yield (
                f"{key}.dataset.cache_limit: {dataset.cache_limit}, but {key}.{name} has no "
                f"remote: streaming would delete the shards of {source.local}; give it a remote, "
                "or remove the limit"
            )


def _shared_folders(loaders: Mapping[str, LoaderConfig]) -> Iterator[str]:
    """Two sources in one folder, of which one is a cache or which streaming would open twice."""
    sources = [
        (key, f"{key}.{name}", source)
        for key, loader in loaders.items()
        for name, source in loader.sources.items()
    ]
    for (loader, one, first), (other_loader, other, second) in combinations(sources, 2):
        cached = first.remote or second.remote
        if _folder(first.local) == _folder(second.local) and (cached or loader == other_loader):
            yield f"{one}.local and {other}.local are both {first.local}; give each its own"
        for a, cache, b, read in ((one, first, other, second), (other, second, one, first)):
            if cache.remote and read.remote and _folder(cache.local) == _folder(read.remote):
                yield (
                    f"{a}.local: {cache.local} is a cache, and {b}.remote is {read.remote}; give "
                    "the cache a folder of its own"
                )


def _folder(place: str) -> str:
    return place if "://" in place else os.path.realpath(place)


def _told(source: StreamConfig) -> str:
    return " and ".join(f"{key} {value}" for key, value in source.weight.items()) or "none"
