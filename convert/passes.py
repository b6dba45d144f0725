"""The two passes over all partitions: one that compares images, and one that writes shards.

Each goes on where the journal says that an earlier run stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from convert.duplicates import EXCEPTIONS, find_exceptions
from convert.engine import Engine, Later, Tell
from convert.errors import NoDataSet
from convert.journal import EXCEPTIONS_NAME, Journal, scan_name
from convert.merge import publish_rejects, too_many_rejects
from convert.partition import Partition, Partitions
from convert.progress import Progress, RejectBudget, TooManyRejects
from convert.split import EVAL, NOT_TAKEN
from convert.tasks import Job, Report, Task, Update, scan_partition, write_partition

Result = TypeVar("Result")
_Converted = tuple[Report, npt.NDArray[Any]]
_Write = Callable[[Task, Tell], _Converted | Later[_Converted]]


def compare_images(
    job: Job,
    partitions: Partitions,
    journal: Journal,
    engine: Engine,
    drop_duplicates: bool,
    show_progress: bool,
) -> npt.NDArray[Any]:
    """Find the items that the split alone does not decide on, since others have their image.

    Args:
        job: What is converted.
        partitions: Its partitions.
        journal: Of this conversion.
        engine: Runs the partitions.
        drop_duplicates: Whether to drop all but the first of equal items.
        show_progress: Show a progress bar.

    Returns:
        An array of `duplicates.EXCEPTIONS`.

    Raises:
        NoDataSet: If all images of the evaluation side are in train as well.
    """
    if job.split.num_eval == 0 and not drop_duplicates:
        return np.empty(0, EXCEPTIONS)  # nothing depends on it
    if EXCEPTIONS_NAME in journal:
        return np.load(journal.path(EXCEPTIONS_NAME), allow_pickle=False)

    def missing() -> Iterator[Task]:
        for partition in partitions:
            if scan_name(partition.number) in journal:
                progress.skip(_num_taken(job, partition))
            else:
                yield Task(partition)

    with Progress("compare", job.split.num_taken, show_progress) as progress:
        scan = partial(scan_partition, job)
        with closing(_run(engine, scan, missing(), progress.hear)) as scanned:
            for partition, hashes in scanned:
                journal.keep_array(hashes, scan_name(partition.number))
                progress.finish(partition.number, _num_taken(job, partition))

    parts = [journal.path(scan_name(partition.number)) for partition in partitions]
    exceptions = find_exceptions(parts, job.split.num_taken, drop_duplicates)
    left_out_of_eval = np.count_nonzero(exceptions["side"] == EVAL)
    if job.split.num_eval and left_out_of_eval == job.split.num_eval:
        raise NoDataSet(
            f"each of the {job.split.num_eval} samples of eval has an image that train has as "
            "well. No data set was written. Give --eval-ratio 0 and evaluate on other data, or a "
            "larger --eval-ratio"
        )
    journal.keep_array(exceptions, EXCEPTIONS_NAME)
    return exceptions


def write_shards(
    job: Job,
    partitions: Partitions,
    journal: Journal,
    engine: Engine,
    exceptions: npt.NDArray[Any],
    max_reject_ratio: float,
    show_progress: bool,
) -> None:
    """Convert all partitions that are not finished.

    Args:
        job: What is converted.
        partitions: Its partitions.
        journal: Of this conversion; afterwards it has a report of each partition.
        engine: Runs the partitions.
        exceptions: What `compare_images` found.
        max_reject_ratio: Share of all samples that may be rejected.
        show_progress: Show a progress bar.

    Raises:
        NoDataSet: If more samples are rejected than that, as soon as it is known.
    """
    samples_in = job.split.num_taken
    budget = RejectBudget(samples_in, max_reject_ratio)

    def missing() -> Iterator[Task]:
        for partition in partitions:
            if partition.number not in finished:
                start, end = partition.start, partition.start + partition.num_items
                mine = slice(*np.searchsorted(exceptions["index"], [start, end]))
                yield Task(partition, exceptions[mine])

    def hear(update: Update) -> None:
        progress.hear(update)
        budget.hear(update)
        progress.say(budget.rejected)
        budget.check()

    with Progress("convert", samples_in, show_progress) as progress:
        finished = set(journal.finished())
        for number in sorted(finished):
            report = journal.report(number)
            progress.skip(report.samples_in)
            budget.finish(number, report.rejects)
        try:
            budget.check()
            write: _Write = partial(write_partition, job)
            with closing(_run(engine, write, missing(), hear)) as written:
                for partition, (report, hashes) in written:
                    journal.finish(partition.number, report, hashes)
                    progress.finish(partition.number, report.samples_in)
                    budget.finish(partition.number, report.rejects)
                    budget.check()
        except TooManyRejects:
            publish_rejects(job.destination, journal, budget.unfinished())
            out = job.destination.out
            raise too_many_rejects(budget, samples_in, max_reject_ratio, out) from None


def _run(
    engine: Engine,
    function: Callable[[Task, Tell], Result | Later[Result]],
    tasks: Iterator[Task],
    hear: Callable[[Update], None],
) -> Generator[tuple[Partition, Result], None, None]:
    """Run tasks, and give the partition of each with its result, in any order."""
    underway: dict[int, Partition] = {}

    def noted() -> Iterator[Task]:
        for place, task in enumerate(tasks):
            underway[place] = task.partition
            yield task

    with closing(engine.map(function, noted(), hear)) as results:
        for place, result in results:
            yield underway.pop(place), result


def _num_taken(job: Job, partition: Partition) -> int:
    sides = job.split.sides(partition.start, partition.num_items)
    return int(np.count_nonzero(sides != NOT_TAKEN))
