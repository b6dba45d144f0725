"""Times of a training yaml, such as 1ep or 0.03dur: each kind of key says which units it takes.

Composer parses a time where it is used, after the towers are loaded, and raises a different error
for each mistake. `TimeRule` finds them all when the yaml is read.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Annotated

from composer.core import Time, TimeUnit

from vlm_composer.config.section import Constraint

_CLOCK = re.compile(r"(?=[0-9])([0-9]+h)?([0-9]+m)?([0-9]+s)?")


@dataclass(frozen=True)
class TimeRule(Constraint):
    """What a key that holds a time accepts.

    Attributes:
        units: Units that work there.
        example: Values that work there.
        zero: Whether 0 works.
    """

    units: tuple[str, ...]
    example: str
    zero: bool = False
    replaces_type = True

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"a time such as {self.example}"

    def fault_of(self, text: str) -> str | None:
        give = f"give {self.expected}"
        if not (_CLOCK.fullmatch(text) or re.search(r"[a-zA-Z]\s*$", text)):
            return f"{text!r} has no unit; {give}"
        try:
            time = Time.from_timestring(text)
        except TypeError:
            return f"{text!r} is not a whole number; {give}"
        except (ValueError, OverflowError):
            return f"{text!r} is not a time; {give}"
        if time.unit not in [TimeUnit(unit) for unit in self.units]:
            return f"{text!r} is not in {', '.join(self.units)}; {give}"
        if time.value < 0 or (time.value == 0 and not self.zero):
            return f"{text!r} is {'less' if self.zero else 'not greater'} than 0; {give}"
        most = 1 if time.unit == TimeUnit.DURATION else sys.maxsize
        if not time.value <= most:  # NaN as well
            return f"{text!r} is more than {most}{time.unit.value}; {give}"
        return None


RUN_LENGTH = TimeRule(("ep", "ba", "sp", "tok"), "1ep or 500ba")
"""Length of the run. Composer cannot end a run by the clock."""

WARMUP = TimeRule(("ep", "ba", "sp", "tok", "dur"), "100ba or 0.03dur", zero=True)
"""A part of the run, in its unit or as a share of it."""

Interval = Annotated[str, TimeRule(("ep", "ba", "sp", "tok", "dur", "sec"), "1ep, 500ba or 1h30m")]
"""How often something is done."""

ConsoleInterval = Annotated[str, TimeRule(("ep", "ba"), "1ep or 20ba")]
"""How often Composer's console logger writes."""
