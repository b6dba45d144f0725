"""Makes one data set of the finished partitions. It can be done again if it does not come to an
end: all it needs is in the journal, and the summary, which says that it is whole, goes last.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from convert.destination import QUALITY, REJECTS, SUMMARY, Destination
from convert.duplicates import count_sharing
from convert.errors import NoDataSet, Reason
from convert.journal import Journal, hashes_name
from convert.progress import RejectBudget
from convert.quality import PLACEHOLDER_TEXTS, Quality, Statistics, TurnCounts
from convert.split import SIDES, Side
from convert.summary import Counts, Summary
from convert.tasks import Job, Report
from convert.writer import num_bytes, publish_index, publish_text


@dataclass
class _Tally:
    """Running sums over the partitions of a source, or of all."""

    samples_in: int = 0
    moved_to_train: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    by_reason: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    turns: TurnCounts = field(default_factory=TurnCounts)

    def add(self, report: Report) -> None:
        self.samples_in += report.samples_in
        self.moved_to_train += report.moved_to_train
        self.samples += report.samples
        self.by_reason += report.by_reason
        self.turns.merge(report.statistics.turns)
        for folder, shards in report.shards.items():
            self.shards[folder.rpartition("/")[2]] += len(shards)
            self.bytes += num_bytes(shards)

    @property
    def rejected_by_reason(self) -> dict[str, int]:
        """The most frequent first; what was dropped as a duplicate is no reject."""
        rejects = {r: n for r, n in self.by_reason.items() if r != Reason.DUPLICATE}
        return dict(Counter(rejects).most_common())

    def counts(self, source_items: int) -> Counts:
        rejects = self.rejected_by_reason
        return Counts(
            source_items=source_items,
            samples_in=self.samples_in,
            train=self.samples["train"],
            eval=self.samples["eval"],
            rejected=sum(rejects.values()),
            rejected_by_reason=rejects,
            duplicates=self.by_reason[Reason.DUPLICATE],
            moved_to_train=self.moved_to_train,
            several_rounds=self.turns.several_rounds,
            dropped_turns=self.turns.dropped_turns,
            shards={side: self.shards[side] for side in SIDES if self.shards[side]},
            bytes=self.bytes,
        )


def merge(
    job: Job, journal: Journal, arguments: Mapping[str, Any], started: float
) -> tuple[Summary, Quality]:
    """Publish all that makes a data set of the shards: the indices, and last the summary.

    Args:
        job: What was converted.
        journal: That of a conversion whose partitions are all finished.
        arguments: What the conversion was called with.
        started: When it began, by `time.monotonic`.

    Returns:
        What summary.json and quality.json say.

    Raises:
        NoDataSet: If no sample of a side is left.
        ConversionError: If an upload fails.
    """
    total, statistics = _Tally(), Statistics()
    tallies = [_Tally() for _ in job.sources]
    for report in _reports(journal):
        total.add(report)
        tallies[report.source].add(report)
        statistics.merge(report.statistics)
    counts = total.counts(sum(job.source_items))
    publish_rejects(job.destination, journal)
    _check_sides(job, counts)

    for source, tally in enumerate(tallies):
        for side in SIDES:
            if tally.shards[side]:
                _publish_side(job, journal, source, side)
    quality = _quality(job, journal, statistics, counts)
    publish_text(job.destination, quality.to_json(), QUALITY)
    job.destination.wait()

    summary = Summary(
        **asdict(counts),
        seconds=round(time.monotonic() - started, 3),
        images={
            name: {"min": sizes.min, "max": sizes.max, "mean": sizes.mean}
            for name in ("width", "height", "bytes")
            if (sizes := statistics.histograms[name]).count
        },
        sources={
            source.name: tally.counts(num_items)
            for source, tally, num_items in zip(job.sources, tallies, job.source_items, strict=True)
            if source.name
        },
        arguments=dict(arguments),
    )
    publish_text(job.destination, summary.to_json(), SUMMARY)
    job.destination.wait()
    return summary, quality


def publish_rejects(
    destination: Destination, journal: Journal, more: Iterable[Mapping[str, Any]] = ()
) -> None:
    """Write rejects.jsonl of what is finished.

    Args:
        destination: Where.
        journal: Has the partitions' reports.
        more: Lines of partitions that are not finished.
    """
    path = destination.stage(REJECTS)
    lines = chain.from_iterable(report.rejects for report in _reports(journal))
    with path.open("w", encoding="ascii") as file:
        for line in chain(lines, more):
            file.write(json.dumps(line) + "\n")
    destination.publish(path, REJECTS)
    destination.wait()


def too_many_rejects(
    budget: RejectBudget, samples_in: int, max_reject_ratio: float, out: str
) -> NoDataSet:
    """Say that more was rejected than the run may leave out.

    Args:
        budget: Has counted it.
        samples_in: Items taken.
        max_reject_ratio: The share of them that may be rejected.
        out: The destination.
    """
    by_reason = budget.by_reason + Counter(line["reason"] for line in budget.unfinished())
    reasons = ", ".join(f"{count} {reason}" for reason, count in by_reason.most_common())
    rejected = by_reason.total()
    example = budget.examples[by_reason.most_common(1)[0][0]]
    return NoDataSet(
        f"{rejected} of {samples_in} samples were rejected ({reasons}): a share of "
        f"{rejected / samples_in:.4g}, above max_reject_ratio {max_reject_ratio:.4g}. No data "
        f"set was written. One of them: {example[:300]}. See {out.rstrip('/')}/{REJECTS}; fix the "
        "source, or raise --max-reject-ratio"
    )


def _reports(journal: Journal) -> Iterator[Report]:
    """Those of all finished partitions in order, one in memory at a time."""
    return (journal.report(number) for number in journal.finished())


def _check_sides(job: Job, counts: Counts) -> None:
    wanted = {"train": True, "eval": job.split.num_eval > 0}
    for side, count in {"train": counts.train, "eval": counts.eval}.items():
        if wanted[side] and count == 0:
            raise NoDataSet(
                f"all samples of {side} were rejected. No data set was written. See "
                f"{job.destination.out.rstrip('/')}/{REJECTS} and mend the source"
            )


def _publish_side(job: Job, journal: Journal, source: int, side: Side) -> None:
    folder = job.folder(source, side)
    shards = (shard for report in _reports(journal) for shard in report.shards.get(folder, ()))
    publish_index(job.destination, folder, shards)


def _quality(job: Job, journal: Journal, statistics: Statistics, counts: Counts) -> Quality:
    hashes = [journal.path(hashes_name(number)) for number in journal.finished()]
    sharing = count_sharing(hashes, job.split.num_taken, PLACEHOLDER_TEXTS)
    examples = [
        {
            "samples": image.items,
            "texts": image.texts,
            "items": [job.place(index) for index in image.examples],
        }
        for image in sharing.most_shared
    ]
    return Quality.of(statistics, counts.rejected_by_reason, sharing, examples)
