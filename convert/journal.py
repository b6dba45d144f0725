"""What an unfinished conversion has done, kept in the destination, so that it can go on.

A journal is the folder .convert/ of the destination:

- `plan.json` says what is converted and how;
- `scan-PPPPP.npy` has the hashes of a partition's items, before it is converted;
- `exceptions.npy` is what follows from all of these;
- `PPPPP.npy` has the hashes of a partition's samples, and `PPPPP.json` says what became of it.

Only one process writes it, each file at once and after all that it speaks of is there. What was
done last may be missing, and is then done again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convert.destination import JOURNAL, Destination
from convert.errors import ConversionError
from convert.tasks import Report
from vlm_composer.mds.json_object import parse_object

_PLAN = "plan.json"
PLAN = f"{JOURNAL}/{_PLAN}"
_REPORT = re.compile(r"([0-9]{5}|[1-9][0-9]{5,17})\.json")

EXCEPTIONS_NAME = "exceptions.npy"


def scan_name(number: int) -> str:
    """Of the hashes of a partition's items."""
    return f"scan-{number:05}.npy"


def hashes_name(number: int) -> str:
    """Of the hashes of a partition's samples."""
    return f"{number:05}.npy"


def _report_name(number: int) -> str:
    return f"{number:05}.json"


class Journal:
    """The journal of a destination.

    Args:
        destination: Where it is. Nothing is written yet.
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        start = f"{JOURNAL}/"
        self._names = {name.removeprefix(start) for name in destination.names(start)}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def plan(self) -> dict[str, Any] | None:
        """What `begin` was told, by this run or an earlier one; None if nothing was begun.

        Raises:
            ConversionError: The file is none of ours.
        """
        return read_ours(self._destination, PLAN)

    def begin(self, plan: dict[str, Any]) -> None:
        """Say what will be converted. To be called before anything else is written."""
        path = self.stage(_PLAN)
        path.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        self.keep(path, _PLAN)

    def stage(self, name: str) -> Path:
        """Where to write a file before it is kept."""
        return self._destination.stage(f"{JOURNAL}/{name}")

    def keep(self, path: Path, name: str) -> None:
        """Add a finished file."""
        self._destination.keep(path, f"{JOURNAL}/{name}")
        self._names.add(name)

    def keep_array(self, array: npt.NDArray[Any], name: str) -> None:
        """Add an array."""
        path = self.stage(name)
        with path.open("wb") as file:
            np.save(file, array)
        self.keep(path, name)

    def path(self, name: str) -> Path:
        """A kept file, on the local disk."""
        assert name in self
        return self._destination.local(f"{JOURNAL}/{name}")

    def finish(self, number: int, report: Report, hashes: npt.NDArray[Any]) -> None:
        """Say that a partition is finished.

        Args:
            number: Of the partition.
            report: What became of it.
            hashes: Of its samples.
        """
        self.keep_array(hashes, hashes_name(number))
        path = self.stage(_report_name(number))
        path.write_text(report.to_json(), encoding="utf-8")
        self.keep(path, _report_name(number))

    def finished(self) -> list[int]:
        """Numbers of the partitions that are finished, in order."""
        return sorted(int(match[1]) for name in self._names if (match := _REPORT.fullmatch(name)))

    def report(self, number: int) -> Report:
        """What became of a finished partition."""
        return Report.from_json(self.path(_report_name(number)).read_bytes())

    def forget(self, number: int) -> None:
        """Have a partition converted again."""
        self._destination.delete(f"{JOURNAL}/{_report_name(number)}")
        self._names.remove(_report_name(number))

    def delete(self) -> None:
        """Delete the journal. The plan goes last: half deleted, it says what was converted."""
        for name in sorted(self._names, key=lambda name: name == _PLAN):
            self._destination.delete(f"{JOURNAL}/{name}")
        self._names.clear()


def read_ours(destination: Destination, name: str) -> dict[str, Any] | None:
    """Read a JSON object that a conversion wrote; None where there is none of that name.

    Raises:
        ConversionError: It is no such object, so that what belongs to its data set is not known.
    """
    content = destination.read(name)
    try:
        return None if content is None else parse_object(content)
    except ValueError as error:
        raise ConversionError(
            f"{destination.out.rstrip('/')}/{name} does not say which files are its data set's: "
            f"{error}. Remove it, or convert to another place"
        ) from error


def check_same(begun: dict[str, Any], plan: dict[str, Any], out: str) -> None:
    """Refuse to go on with what another command began.

    Args:
        begun: The plan in the journal.
        plan: That of this run.
        out: The destination, for the message.

    Raises:
        ConversionError: They differ; the message has both values of what differs.
    """
    before, now = _flat(begun), _flat(json.loads(json.dumps(plan)))
    differing = [
        f"{key} {_brief(before.get(key))} (now {_brief(now.get(key))})"
        for key in [*before, *(now.keys() - before.keys())]
        if before.get(key) != now.get(key)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConversionError(
            f"{out} holds an unfinished conversion with {', '.join(differing[:3])}{more}: give the "
            "same command to finish it, --overwrite to delete it, or convert to another place"
        )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """The leaves of a JSON value, with their paths."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = [(str(place), part) for place, part in enumerate(value)]  # type: ignore[assignment]
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, part in parts:
        flat |= _flat(part, f"{key}.{name}" if key else name)
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
