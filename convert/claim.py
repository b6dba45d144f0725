"""What a destination holds before a run, and what becomes of it: gone on with, deleted, refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from convert.destination import JOURNAL, QUALITY, REJECTS, SUMMARY, Destination
from convert.errors import ConversionError
from convert.journal import PLAN, Journal, check_same, read_ours
from convert.sources.source import NAMING, is_source_name
from convert.split import SIDES
from convert.summary import Summary
from vlm_composer.mds.json_object import is_count, shown

_OF_A_SIDE = re.compile(r"index\.json|features\.json|shard(\.[0-9]{5,}){1,2}\.mds")
_TOP = (SUMMARY, REJECTS, QUALITY)


def claim(destination: Destination, overwrite: bool, sources: Sequence[str] = ("",)) -> None:
    """Makes sure that the destination holds nothing that could be taken for part of this run.

    Args:
        destination: Where the data set will be written.
        overwrite: Delete an earlier data set. Files that no conversion writes are never deleted.
        sources: Names of the sources; "" where the sides are not in a source's folder.

    Raises:
        ConversionError: If it holds a data set, whole or in part, and `overwrite` is off; files
            below train/ or eval/ that are none of ours; a summary or a plan that names a source as
            none can be called; or a link to another folder.
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
    names = [*top, *journal, *sorted(data_set, key=lambda name: name.endswith(".mds"))]
    destination.check_inside(names)
    for name in names:
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
        finished = _finished(destination) if begun == _as_json(plan) else None
        journal.delete()
        if finished is not None:
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
    destination.check_inside(there - finished)
    for name in sorted(there - finished):
        destination.delete(name)


def _earlier_sources(destination: Destination) -> Iterator[str]:
    """Names of the sources of a data set, or of an unfinished one, that the destination holds.

    What a file names is joined to the destination and deleted, so it must be a source's name.
    """
    for name in (SUMMARY, PLAN):
        sources = (read_ours(destination, name) or {}).get("sources", [])
        if name == PLAN and isinstance(sources, list):
            sources = [entry.get("name") if isinstance(entry, dict) else entry for entry in sources]
        for source in sources if isinstance(sources, dict | list) else [sources]:
            if source == "" or source in SIDES:  # one source, or the sides of features
                continue
            if not is_source_name(source):
                raise ConversionError(
                    f"{destination.out.rstrip('/')}/{name} names a source {shown(source)}, and a "
                    f"source's name has {NAMING}: nothing was deleted. Remove that file, or "
                    "convert to another place"
                )
            yield source


def _finished(destination: Destination) -> Summary:
    """The summary of a conversion that was killed while it cleaned up."""
    try:
        summary = Summary.from_json(destination.read(SUMMARY) or b"")
        if not all(map(is_count, (summary.train, summary.eval, summary.rejected, summary.bytes))):
            raise ValueError("a number is not one")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{destination.out.rstrip('/')}/{SUMMARY} is not one of a finished conversion "
            f"({error!r}): remove it and give the same command again"
        ) from error
    return summary


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
