"""Is a data set what it should be? `python -m convert verify DEST`.

Reads every byte of it: that the shards are those of the index, that every sample and every image
can be decoded, that the numbers agree, and that nothing of the eval side is in train.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from convert.destination import JOURNAL, REJECTS, SUMMARY
from convert.engine import LocalEngine
from convert.errors import ConversionError
from convert.shard_check import HeldOut, ShardReport, ShardTask, check_shard
from convert.split import SIDES, Side
from convert.staging import Scratch
from convert.written import Shard, SideFolder, Written
from vlm_composer.mds.index import INDEX_FILE, IndexFaultError
from vlm_composer.mds.json_object import is_count, shown
from vlm_composer.plain_text import plain, say


@dataclass
class Verification:
    """What a data set was found to be."""

    samples: dict[Side, int]
    """Of each side, as the index files say."""

    shards: dict[Side, int]
    """Of each side that there is."""

    bytes: int
    """Of the shards."""

    faults: int = 0


def verify_data_set(
    place: str | Path,
    *,
    workers: int | None = None,
    on_fault: Callable[[str], None] = print,
    show_progress: bool = True,
) -> Verification:
    """Checks a data set, to its last byte.

    The eval side is checked first: of each of its images 32 bytes are kept on the local disk (and
    in this process, until they are sorted), to be looked up from the train side. Of a bucket, each
    worker has one shard at a time on the local disk. Both are under TMPDIR.

    Args:
        place: A folder, or s3://bucket/prefix, gs://bucket/prefix or azure://container/prefix; of
            one source, or of several.
        workers: Processes that check shards; None takes one a core.
        on_fault: Is called with a line for each fault, as they are found.
        show_progress: Show a progress bar on stderr.

    Returns:
        What was counted; `faults` is 0 where all is well.

    Raises:
        ConversionError: If there is no data set of images, or `workers` is below 1.
        StoreError: If the store, or the local disk, cannot be used.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    engine = LocalEngine(workers)
    written = Written(os.fspath(place))
    with closing(Scratch()) as scratch, closing(_Progress(on_fault, show_progress)) as progress:
        indexed = _read_index_files(written, progress)
        found = _count(indexed)
        _check_summary(written, indexed, progress)
        present = _check_names(written, indexed, progress)
        progress.start(sum(found.samples.values()))
        staging = str(scratch.folder)
        tasks = [ShardTask(written.place, shard, staging) for shard in present["eval"]]
        held_out = [progress.shard(report) for _, report in engine.map(check_shard, tasks)]
        if held_out:
            HeldOut.save(held_out, scratch.folder)
        lookup = staging if held_out else None
        tasks = [ShardTask(written.place, shard, staging, lookup) for shard in present["train"]]
        for _, report in engine.map(check_shard, tasks):
            progress.shard(report)
        found.faults = progress.faults
    return found


class _Progress:
    """Counts faults and samples, and shows both."""

    def __init__(self, on_fault: Callable[[str], None], show_progress: bool) -> None:
        self.faults = 0
        self._on_fault = on_fault
        self._bar = tqdm(
            desc="verify",
            unit=" samples",
            disable=not show_progress,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants few lines
        )

    def start(self, num_samples: int) -> None:
        """Says how much there is to do."""
        self._bar.reset(num_samples)

    def fault(self, line: str, count: int = 1) -> None:
        """Notes a fault, or several in one line."""
        self.faults += count
        with tqdm.external_write_mode():
            self._on_fault(plain(line))
        self._bar.set_postfix(faults=self.faults, refresh=False)

    def shard(self, report: ShardReport) -> ShardReport:
        """Notes what was found in a shard; returns the same."""
        for line in report.faults:
            self.fault(line)
        if unnamed := report.num_faults - len(report.faults):
            self.fault(f"{report.task.shard.name}: {unnamed} faults more", unnamed)
        self._bar.update(report.task.shard.samples)
        return report

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def _count(indexed: Mapping[SideFolder, list[Shard]], source: str | None = None) -> Verification:
    """What the index files say, of all sources or of one."""
    shards = {
        side: [
            shard
            for folder, found in indexed.items()
            if folder.side == side and source in (None, folder.source)
            for shard in found
        ]
        for side in SIDES
    }
    return Verification(
        samples={side: sum(shard.samples for shard in shards[side]) for side in SIDES},
        shards={side: len(shards[side]) for side in SIDES if shards[side]},
        bytes=sum(shard.bytes for side in SIDES for shard in shards[side]),
    )


def _read_index_files(written: Written, progress: _Progress) -> dict[SideFolder, list[Shard]]:
    """Reads the index of each side, where it can be read."""
    indexed = {}
    for folder in written.sides:
        try:
            indexed[folder] = written.shards(folder)
        except IndexFaultError as error:
            progress.fault(f"{folder.path}/{INDEX_FILE}: {error}")
    return indexed


def _check_names(
    written: Written, indexed: dict[SideFolder, list[Shard]], progress: _Progress
) -> dict[Side, list[Shard]]:
    """Compares the index files with the files that there are; returns the shards that are there."""
    present: dict[Side, list[Shard]] = {side: [] for side in SIDES}
    for folder, shards in indexed.items():
        names = {f"{folder.path}/{INDEX_FILE}"}
        for shard in shards:
            if shard.name not in written.files:
                progress.fault(f"{shard.name}: missing, with its {shard.samples} samples")
            else:
                present[folder.side].append(shard)
            names.add(shard.name)
        for name in written.files:
            if name.startswith(f"{folder.path}/") and name not in names:
                progress.fault(f"{name}: stray: the index does not name it")
    if any(name.startswith(f"{JOURNAL}/") for name in written.files):
        progress.fault(f"{JOURNAL}/: the conversion did not finish: run the same command again")
    return present


def _check_summary(
    written: Written, indexed: dict[SideFolder, list[Shard]], progress: _Progress
) -> None:
    """Compares the summary's numbers with those of the index files and of the rejects."""
    try:
        summary = written.read_json(SUMMARY)
    except ValueError as error:
        progress.fault(f"{SUMMARY}: {error}")
        return
    if summary is None:
        progress.fault(f"{SUMMARY}: missing: the conversion did not finish")
        return
    told, named = summary.get("sources"), {folder.source for folder in indexed} - {""}
    told = told if isinstance(told, dict) else {}
    for fault in (
        *_differences("", summary, _count(indexed)),
        *(
            difference
            for name in sorted(named | told.keys())
            for difference in _differences(
                f"sources.{plain(name)}.", told.get(name), _count(indexed, name)
            )
        ),
    ):
        progress.fault(f"{SUMMARY}: {fault}")
    rejects = written.num_rejects()
    left_out = [summary.get(key, 0) for key in ("rejected", "duplicates")]
    if rejects is None:
        progress.fault(f"{REJECTS}: missing")
    elif not all(map(is_count, left_out)) or rejects != sum(left_out):
        progress.fault(
            f"{SUMMARY}: {shown(left_out[0])} rejected and {shown(left_out[1])} duplicates, and "
            f"{REJECTS} has {rejects} lines"
        )


def _differences(before: str, told: Any, found: Verification) -> Iterator[str]:
    """Where a summary's numbers are not those of the index files."""
    told = told if isinstance(told, dict) else {}
    counted = {str(side): count for side, count in found.samples.items()}
    for key, number in (counted | {"shards": found.shards, "bytes": found.bytes}).items():
        if told.get(key) != number:
            yield f"{before}{key} is {shown(told.get(key))}, and the index files say {number!r}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m convert verify")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(options: argparse.Namespace) -> int:
    """Verify as `add_arguments` describes.

    Returns:
        The exit status: 0 when all is well, 1 when there are faults, 2 when it could not be looked
        at, 130 when interrupted.
    """
    try:
        found = verify_data_set(options.dest, workers=options.workers)
    except (ConversionError, OSError) as error:
        say(f"convert verify: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"convert verify: interrupted: {options.dest} was not verified")
        return 130
    counts = " and ".join(f"{count} {side}" for side, count in found.samples.items())
    print(
        f"{counts} samples in {sum(found.shards.values())} shards of {options.dest} "
        f"({found.bytes / 1e6:.1f} MB): "
        + (f"{found.faults} faults" if found.faults else "all well")
    )
    return 1 if found.faults else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = (
        "Check every shard, sample and image of a data set. Exit status: 0 when all is "
        "well, 1 when there are faults (a line for each), 2 when it could not be looked at."
    )
    add = parser.add_argument
    add(
        "dest", metavar="DEST", help="folder, or s3://, gs:// or azure:// URL that was converted to"
    )
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
