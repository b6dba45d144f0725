"""What can be said of the samples of a data set without training on it: quality.json.

Everything here is a running sum or has a fixed number of bins: it takes the same memory for any
number of samples, and the statistics of partitions add up to those of all.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from convert.duplicates import Sharing
from convert.longest_prompts import LongestPrompts
from convert.record import Turns
from vlm_composer.data.schema import Record

WORDS = (0, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500)
CHARACTERS = (0, 5, 10, 20, 40, 60, 80, 100, 150, 200, 300, 500, 1000, 2000, 5000)
PIXELS = (0, 16, 32, 64, 128, 224, 256, 336, 384, 448, 512, 640, 768, 1024, 2048, 4096)
BYTES = (0, *(1 << power for power in range(8, 27)))

PLACEHOLDER_TEXTS = 10
"""An image with so many different texts may say "image not found" in place of another."""

_PROMPTS = 1000
"""Different prompts that are counted one by one: the first ones."""
_PROMPT_LENGTH = 200
_PROMPTS_LISTED = 100
_ALARMING_SHARE = 0.01

_MAGIC = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"RIFF", "WEBP"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)


@dataclass
class Histogram:
    """Counts of whole numbers by bins: `bins[i]` numbers are ≥ `edges[i]` and < `edges[i + 1]`."""

    edges: Sequence[int]
    bins: list[int] = field(default_factory=list)
    count: int = 0
    total: int = 0
    min: int | None = None
    max: int | None = None

    def __post_init__(self) -> None:
        self.bins = self.bins or [0] * len(self.edges)

    def add(self, number: int) -> None:
        """Count a number of at least `edges[0]`."""
        self.bins[bisect_right(self.edges, number) - 1] += 1
        self.count += 1
        self.total += number
        if self.min is None or number < self.min:
            self.min = number
        if self.max is None or number > self.max:
            self.max = number

    def merge(self, other: Histogram) -> None:
        """Count what another has counted by the same bins."""
        self.bins = [mine + theirs for mine, theirs in zip(self.bins, other.bins, strict=True)]
        self.count += other.count
        self.total += other.total
        self.min = min((n for n in (self.min, other.min) if n is not None), default=None)
        self.max = max((n for n in (self.max, other.max) if n is not None), default=None)

    @property
    def mean(self) -> float | None:
        """Of all numbers; None of none."""
        return self.total / self.count if self.count else None


@dataclass
class PromptCounts:
    """How often each prompt is asked, up to a number of different ones."""

    counts: dict[str, int] = field(default_factory=dict)
    """The start of a prompt → samples."""

    others: int = 0
    """Samples with prompts that were met once `counts` was full."""

    def add(self, prompt: str, count: int = 1) -> None:
        """Count a prompt."""
        prompt = prompt[:_PROMPT_LENGTH]
        if prompt in self.counts or len(self.counts) < _PROMPTS:
            self.counts[prompt] = self.counts.get(prompt, 0) + count
        else:
            self.others += count

    def merge(self, other: PromptCounts) -> None:
        """Count what another has counted, of samples that come later."""
        for prompt, count in other.counts.items():
            self.add(prompt, count)
        self.others += other.others


@dataclass
class TurnCounts:
    """Turns of the samples' conversations."""

    several_rounds: int = 0
    """Samples with more than one round, of which they have the first."""

    with_dropped_turns: int = 0
    """Samples with turns that are not used: further rounds, turns without an answer, of others."""

    dropped_turns: int = 0
    """Turns that are not used."""

    def add(self, turns: Turns) -> None:
        """Count a sample's."""
        self.several_rounds += turns.rounds > 1
        self.with_dropped_turns += turns.dropped > 0
        self.dropped_turns += turns.dropped

    def merge(self, other: TurnCounts) -> None:
        """Count what another has counted."""
        self.several_rounds += other.several_rounds
        self.with_dropped_turns += other.with_dropped_turns
        self.dropped_turns += other.dropped_turns


class Statistics:
    """Lengths, sizes, prompts and turns of some samples."""

    def __init__(self) -> None:
        self.histograms = {
            "width": Histogram(PIXELS),
            "height": Histogram(PIXELS),
            "bytes": Histogram(BYTES),
            "words": Histogram(WORDS),
            "characters": Histogram(CHARACTERS),
        }
        self.formats: Counter[str] = Counter()
        self.prompts = PromptCounts()
        self.turns = TurnCounts()
        self.longest = LongestPrompts()

    def add(
        self,
        record: Record,
        size: tuple[int, int],
        turns: Turns | None = None,
        folder: str = "",
    ) -> None:
        """Count a sample.

        Args:
            record: The sample.
            size: Its image's (width, height) in pixels.
            turns: Those of the item that it was made of, where they are known.
            folder: Where its shard is, relative to the destination.
        """
        if turns is not None:
            self.turns.add(turns)
        image, answer = record["image"], record["answer"]
        numbers = (*size, len(image), len(answer.split()), len(answer))
        for histogram, number in zip(self.histograms.values(), numbers, strict=True):
            histogram.add(number)
        self.formats[_format(image)] += 1
        self.prompts.add(record["prompt"])
        self.longest.add(folder, record["prompt"])

    def merge(self, other: Statistics) -> None:
        """Count what another has counted, of samples that come later."""
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])
        self.formats += other.formats
        self.prompts.merge(other.prompts)
        self.turns.merge(other.turns)
        self.longest.merge(other.longest)

    def to_json(self) -> dict[str, Any]:
        """JSON values, for `from_json`."""
        return {
            "histograms": {name: asdict(value) for name, value in self.histograms.items()},
            "formats": dict(self.formats),
            "prompts": asdict(self.prompts),
            "turns": asdict(self.turns),
            "longest_prompts": self.longest.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        statistics = cls()
        statistics.histograms = {
            name: Histogram(**fields) for name, fields in value["histograms"].items()
        }
        statistics.formats = Counter(value["formats"])
        statistics.prompts = PromptCounts(**value["prompts"])
        statistics.turns = TurnCounts(**value["turns"])
        # Of a conversion that an earlier version began, these are some of the prompts.
        statistics.longest = LongestPrompts.from_json(value.get("longest_prompts", {}))
        return statistics


@dataclass(frozen=True)
class Quality:
    """What quality.json says of the samples of both sides."""

    samples: int
    rejected_by_reason: dict[str, int]

    exact_duplicates: int
    """Samples whose image and text an earlier sample has. (Those that were dropped are rejects.)"""

    same_image_other_text: int
    """Samples whose image, but not text, an earlier sample has."""

    placeholder_images: int
    """Images with at least `PLACEHOLDER_TEXTS` different texts."""

    placeholder_examples: list[dict[str, Any]]
    """Of these the worst: their number of samples and of different texts, and their first items as
    in rejects.jsonl."""

    turns: dict[str, int]
    """See `TurnCounts`."""

    captions: dict[str, dict[str, Any]]
    """Of the answers, histograms of `words` and `characters`."""

    images: dict[str, dict[str, Any]]
    """Histograms of `width`, `height` and `bytes`."""

    formats: dict[str, int]
    """Images of each file format."""

    prompts: list[dict[str, Any]]
    """The most frequent prompts and their counts, as far as `prompts_uncounted` lets one say."""

    prompts_different: int
    """Prompts that were counted one by one, by their first 200 characters; at most 1,000."""

    prompts_uncounted: int
    """Samples with other prompts."""

    longest_prompts: dict[str, list[dict[str, Any]]]
    """Of each folder of shards the longest different prompts, at most 8: `bytes` in UTF-8, and the
    `prompt`'s first 10,000 characters. A run compares them with its `max_seq_len`."""

    @classmethod
    def of(
        cls,
        statistics: Statistics,
        rejected_by_reason: Mapping[str, int],
        sharing: Sharing,
        examples: Sequence[dict[str, Any]],
    ) -> Self:
        """Put together what was counted.

        Args:
            statistics: Of all samples.
            rejected_by_reason: Of all items.
            sharing: Of all samples.
            examples: `sharing.most_shared`, with its items' places in their sources.
        """
        histograms = {
            name: {**asdict(value), "mean": value.mean}
            for name, value in statistics.histograms.items()
        }
        counts = statistics.prompts.counts
        listed = sorted(counts, key=lambda prompt: -counts[prompt])[:_PROMPTS_LISTED]
        return cls(
            samples=statistics.histograms["words"].count,
            rejected_by_reason=dict(rejected_by_reason),
            exact_duplicates=sharing.exact_duplicates,
            same_image_other_text=sharing.same_image_other_text,
            placeholder_images=sharing.much_shared,
            placeholder_examples=list(examples),
            turns=asdict(statistics.turns),
            captions={name: histograms[name] for name in ("words", "characters")},
            images={name: histograms[name] for name in ("width", "height", "bytes")},
            formats=dict(statistics.formats),
            prompts=[{"prompt": prompt, "samples": counts[prompt]} for prompt in listed],
            prompts_different=len(counts),
            prompts_uncounted=statistics.prompts.others,
            longest_prompts=statistics.longest.to_json(),
        )

    def to_json(self) -> str:
        """The text of quality.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def alarms(self) -> list[str]:
        """What somebody should look at before training on it, a line each."""
        alarms = []
        several, others = self.turns["several_rounds"], self.turns["with_dropped_turns"]
        if several:
            alarms.append(
                f"{several:,} of {self.samples:,} samples have more than one round; only the first "
                "is used"
            )
        if others > several:
            alarms.append(
                f"{others - several:,} of {self.samples:,} samples have turns that belong to no "
                "round, such as a greeting or a system prompt; they are not used"
            )
        if self.placeholder_images:
            worst = self.placeholder_examples[0]
            alarms.append(
                f"{self.placeholder_images} images have {PLACEHOLDER_TEXTS} or more different "
                f"texts, one has {worst['texts']} (first at {_place(worst['items'][0])}): do they "
                "say that an image was not found?"
            )
        if self.exact_duplicates > _ALARMING_SHARE * self.samples:
            alarms.append(
                f"{self.exact_duplicates} of {self.samples} samples repeat the image and text of "
                "another: --drop-duplicates leaves them out"
            )
        return alarms


def _format(image: bytes) -> str:
    """The file format, by how the file begins."""
    for magic, name in _MAGIC:
        if image.startswith(magic):
            return name
    return "other"


def _place(item: Mapping[str, Any]) -> str:
    of = f" of {item['source']}" if "source" in item else ""
    return f"item {item['index']}{of}"
