"""What a conversion did: summary.json."""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Self


def _versions(*more: str) -> dict[str, str]:
    packages = ("vlm-composer", "mosaicml-streaming", "pillow", "numpy", *more)
    return {package: version(package) for package in packages}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The numbers of a source, or of all together. `samples_in` = `train` + `eval` + `rejected` +
    `duplicates`.
    """

    source_items: int
    """Items in the source, those that `max_samples` left out included."""

    samples_in: int
    """Items taken from the source."""

    train: int
    eval: int
    rejected: int
    rejected_by_reason: dict[str, int]

    duplicates: int
    """Items left out because an earlier one has the same image and text (`drop_duplicates`)."""

    moved_to_train: int
    """Items that the split had for evaluation, and whose image is in train as well."""

    several_rounds: int | None = None
    """Samples whose conversation has more than one round, of which the first is used; None where an
    earlier version did not count them."""

    dropped_turns: int | None = None
    """Turns of samples' conversations that are not used; None as above."""

    shards: dict[str, int]
    """Shards of each side that was written."""

    bytes: int
    """Bytes of all shards."""


@dataclass(frozen=True, kw_only=True)
class Summary(Counts):
    """The numbers of a finished conversion."""

    seconds: float
    """Of the last run, where the conversion was interrupted."""

    images: dict[str, dict[str, float | None]]
    """Of the images of both sides: `min`, `max` and `mean` of `width` and `height` in pixels, and
    of `bytes` of the file. quality.json has the rest."""

    sources: dict[str, Counts]
    """The numbers of each source, where several are named."""

    arguments: dict[str, Any]
    """What the conversion was called with: with the source, all it takes to repeat it."""

    versions: dict[str, str] = field(default_factory=_versions)

    def to_json(self) -> str:
        """The text of summary.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What `to_json` gave."""
        value = json.loads(text)
        sources = {name: Counts(**counts) for name, counts in value.pop("sources").items()}
        return cls(sources=sources, **value)


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
