"""What a conversion did: summary.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Self


def _versions(*more: str) -> dict[str, str]:
    packages = ("vlm-composer", "mosaicml-streaming", "pillow", "numpy", *more)
    return {package: version(package) for package in packages}


@dataclass(frozen=True)
class Spread:
    """Smallest, largest and mean of some numbers."""

    min: int
    max: int
    mean: float

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Self:
        """The spread of at least one number."""
        return cls(min(numbers), max(numbers), sum(numbers) / len(numbers))


@dataclass(frozen=True)
class Summary:
    """The numbers of a finished conversion. `samples_in` = `train` + `eval` + `rejected`."""

    source_items: int
    """Items in the source, those that `max_samples` left out included."""

    samples_in: int
    """Items taken from the source."""

    train: int
    eval: int
    rejected: int
    rejected_by_reason: dict[str, int]

    shards: dict[str, int]
    """Shards of each side that was written."""

    bytes: int
    """Bytes of all shards."""

    seconds: float

    images: dict[str, Spread]
    """Of the images of both sides: `width` and `height` in pixels, `bytes` of the file."""

    arguments: dict[str, Any]
    """What the conversion was called with: with the source, all it takes to repeat it."""

    versions: dict[str, str] = field(default_factory=_versions)

    def to_json(self) -> str:
        """The text of summary.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class FeatureSummary:
    """The numbers of a finished pass over the images."""

    train: int
    eval: int

    shards: dict[str, int]
    """Shards of each side that was written."""

    bytes: int
    """Bytes of all shards."""

    seconds: float

    sources: dict[str, dict[str, Any]]
    """Of each side: where its images were read, how many there are, and a hash of their index."""

    settings: dict[str, Any]
    """The training yaml, with its overrides and defaults."""

    versions: dict[str, str] = field(default_factory=lambda: _versions("torch", "transformers"))

    def to_json(self) -> str:
        """The text of summary.json."""
        return json.dumps(asdict(self), indent=2) + "\n"
