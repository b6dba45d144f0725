"""How far a conversion is, and whether so much was rejected that there is no use in going on."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm  # type: ignore[import-untyped]

from convert.errors import Reason
from convert.split import exact
from convert.tasks import Update


class TooManyRejects(Exception):
    """More items were rejected than the run may leave out."""


class RejectBudget:
    """Counts rejects while partitions are converted.

    Args:
        samples_in: Items taken.
        max_reject_ratio: The share of them that may be rejected.
    """

    def __init__(self, samples_in: int, max_reject_ratio: float) -> None:
        self._limit = exact(max_reject_ratio) * samples_in
        self.by_reason: Counter[str] = Counter()
        """Of finished partitions; duplicates are none of them."""
        self.examples: dict[str, str] = {}
        """The detail of one reject of each reason."""
        self._told: dict[int, list[dict[str, Any]]] = {}

    @property
    def rejected(self) -> int:
        """All that is known of."""
        return self.by_reason.total() + sum(1 for _ in self.unfinished())

    def unfinished(self) -> Iterator[dict[str, Any]]:
        """Lines of rejects.jsonl of partitions that are under way, in order."""
        for _, lines in sorted(self._told.items()):
            yield from (line for line in lines if line["reason"] != Reason.DUPLICATE)

    def hear(self, update: Update) -> None:
        """Note what a task tells."""
        if update.rejects:
            self._told.setdefault(update.partition, []).extend(update.rejects)
            self._keep_examples(update.rejects)

    def finish(self, partition: int, rejects: Sequence[dict[str, Any]]) -> None:
        """Note what became of a partition, whether or not it was told before."""
        self._told.pop(partition, None)
        reasons = (line["reason"] for line in rejects)
        self.by_reason += Counter(reason for reason in reasons if reason != Reason.DUPLICATE)
        self._keep_examples(rejects)

    def check(self) -> None:
        """Raise TooManyRejects once there is no use in going on."""
        if self.rejected > self._limit:
            raise TooManyRejects

    def _keep_examples(self, rejects: Sequence[dict[str, Any]]) -> None:
        for line in rejects:
            self.examples.setdefault(line["reason"], line["detail"])


class Progress:
    """A bar on stderr, of items.

    Args:
        what: What is done with them.
        total: How many there are.
        show: Show the bar.
    """

    def __init__(self, what: str, total: int, show: bool) -> None:
        self._told: Counter[int] = Counter()
        self._bar = tqdm(
            desc=what,
            total=total,
            unit=" samples",
            disable=not show,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants few lines
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def skip(self, items: int) -> None:
        """Take items as done that an earlier run has done: they are no part of the rate."""
        if not self._bar.disable:
            self._bar.initial += items
            self._bar.update(items)

    def hear(self, update: Update) -> None:
        """Note what a task tells."""
        self._told[update.partition] += update.items
        self._bar.update(update.items)

    def finish(self, partition: int, items: int) -> None:
        """Take a partition as done, whether or not it was told before."""
        self._bar.update(items - self._told.pop(partition, 0))

    def say(self, rejected: int) -> None:
        """Show how many were rejected."""
        if rejected:
            self._bar.set_postfix(rejected=rejected, refresh=False)
