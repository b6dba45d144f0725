"""How many samples of each of its data sets a loader's epoch takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vlm_composer.config.data import LoaderConfig
from vlm_composer.data.stream import CheckedStream


class Part(NamedTuple):
    """What an epoch takes of a data set."""

    taken: int
    """Samples of the epoch; one that is repeated counts each time."""
    there: int
    """Samples of the data set."""


Mix = dict[str, Part]
"""The parts of an epoch, by their keys in `LoaderConfig.sources`."""


def mix_of(loader: LoaderConfig, samples: Mapping[str, int]) -> Mix:
    """Work out, with streaming's own arithmetic, what an epoch takes of each data set.

    Args:
        loader: The section of the yaml, `loader.sources` with their weights.
        samples: How many each of them has.
    """
    streams = {
        key: CheckedStream(
            store_timeout=0,
            local=source.local,
            proportion=source.proportion,
            repeat=source.repeat,
            choose=source.choose,
        )
        for key, source in loader.sources.items()
    }
    CheckedStream.apply_weights(
        list(streams.values()),
        np.array([samples[key] for key in streams], np.int64),
        loader.dataset.epoch_size,
        loader.dataset.shuffle_seed,
    )
    return {key: Part(int(stream.choose), samples[key]) for key, stream in streams.items()}


def is_mixed(mix: Mix) -> bool:
    """Whether there is more to tell than that an epoch takes every sample of one data set."""
    return len(mix) > 1 or any(part.taken != part.there for part in mix.values())


def epoch_size(mix: Mix) -> int:
    """Samples of an epoch."""
    return sum(part.taken for part in mix.values())


def describe_mix(mix: Mix) -> str:
    """Tell what an epoch takes of each.

    Returns:
        `an epoch of 1,000 samples takes 700 of streams.llava (546,965, each 0.00128 times), …`.
    """
    parts = (
        f"{part.taken:,} of {key} ({part.there:,}, each {part.taken / part.there:.3g} times)"
        for key, part in mix.items()
    )
    return f"an epoch of {epoch_size(mix):,} samples takes {', '.join(parts)}"
