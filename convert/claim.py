"""What a destination holds before a run, and what becomes of it: gone on with, deleted, refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from convert.destination import JOURNAL, QUALITY, REJECTS, SUMMARY, Destination
from convert.errors import ConversionError
from convert.journal import Journal, check_same
from convert.split import SIDES
from convert.summary import Summary

_OF_A_SIDE = re.compile(r"index\.json|features\.json|shard(\.[0-9]{5,}){1,2}\.mds")
_TOP = (SUMMARY, REJECTS, QUALITY)


def claim(destination: Destination, overwrite: bool, sources: Sequence[str] = ("",)) -> None:
    """Makes sure that the destination holds nothing that could be taken for part of this run.

    Args:
        destination: Where the data set will be written.
        overwrite: Delete an earlier data set. Files that no conversion writes are never deleted.
        sources: Names of the sources; "" where the sides are not in a source's folder.

    Raises:
        ConversionError: If it holds a data set, whole or in part, and `overwrite` is off; or files
            below train/ or eval/ that are none of ours.
    """
    earlier = {*sources, *_earlier_sources(destination)}
    data_set = data_set_names(destination, earlier)
    if data_set and not overwrite:
        raise ConversionError(
            f"{destination.out} already holds {len(data_set)} files of a data set, such as "
            f"{data_set[0]}: give --overwrite to delete them, or convert to another place"
        )
    # The summary and the index files first: half deleted, it must not look complete.
    journal = destination.names(f"{JOURNAL}/")
    top = [name for name in _TOP if name in destination.names(name)]
    for name in [*top, *journal, *sorted(data_set, key=lambda name: name.endswith(".mds"))]:
        destination.delete(name)


def begin(
    destination: Destination, plan: dict[str, Any], overwrite: bool, sources: Sequence[str]
) -> tuple[Journal, Summary | None]:
    """Claims the destination for a conversion, or finds that the same one was begun there.

    Args:
        destination: Where the data set will be written.
        plan: What will be converted, and how; JSON values.
        overwrite: Delete an earlier data set, or what another conversion has begun.
        sources: Names of the sources.

    Returns:
        The journal, which has `plan`; and the summary, if there is nothing left to do.

    Raises:
        ConversionError: As `claim`; or another conversion was begun, and `overwrite` is off.
    """
    journal = Journal(destination)
    begun = journal.plan()
    if begun is not None and SUMMARY in destination.names(
        SUMMARY
    ):  # it was killed while it cleaned up
        finished = Summary.from_json(destination.read(SUMMARY) or b"")
        journal.delete()
        if begun == _as_json(plan):
            return journal, finished
    elif begun is not None and begun == _as_json(plan):
        _delete_unfinished(destination, journal, sources)
        return journal, None
    elif begun is not None and not overwrite:
        check_same(begun, plan, destination.out)
    claim(destination, overwrite, sources)
    journal = Journal(destination)
    journal.begin(plan)
    return journal, None


def data_set_names(destination: Destination, sources: Iterable[str]) -> list[str]:
    """Files of data sets below the sides' folders.

    Raises:
        ConversionError: If there are files that no conversion writes.
    """
    names: list[str] = []
    foreign: list[str] = []
    for source in sorted(sources):
        for side in SIDES:
            folder = f"{source}/{side}/" if source else f"{side}/"
            for name in destination.names(folder):
                ours = _OF_A_SIDE.fullmatch(name.removeprefix(folder))
                (names if ours else foreign).append(name)
    if foreign:
        raise ConversionError(
            f"{destination.out} holds {len(foreign)} files that no conversion wrote, such as "
            f"{foreign[0]}: remove them, or convert to another place"
        )
    return names


def _delete_unfinished(destination: Destination, journal: Journal, sources: Sequence[str]) -> None:
    """Delete what a killed run wrote since the journal was last written."""
    there = set(data_set_names(destination, sources))
    finished: set[str] = set()
    for number in journal.finished():
        shards = set(journal.report(number).shard_names())
        if shards <= there:
            finished |= shards
        else:  # somebody deleted them, or the run was killed while it did
            journal.forget(number)
    for name in sorted(there - finished):
        destination.delete(name)


def _earlier_sources(destination: Destination) -> Iterator[str]:
    """Names of the sources of a data set, or of an unfinished one, that the destination holds."""
    for name in (SUMMARY, f"{JOURNAL}/plan.json"):
        with suppress(ValueError, TypeError, AttributeError):  # it may be no JSON of ours
            sources = json.loads(destination.read(name) or b"{}").get("sources", [])
            names = [source["name"] for source in sources] if name != SUMMARY else list(sources)
            yield from (name for name in names if isinstance(name, str) and name not in SIDES)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
