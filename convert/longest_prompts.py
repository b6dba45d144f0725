"""The longest prompts of a data set, which preflight tokenizes: the answer needs some room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

_LISTED = 8
_LENGTH = 10_000
"""Characters that are kept of a prompt."""


@dataclass
class LongestPrompts:
    """The longest different prompts of each folder of shards: a run whose `max_seq_len` is too
    small for one would end at it."""

    folders: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Folder → UTF-8 bytes and the beginning of each, the longest first."""

    def add(self, folder: str, prompt: str) -> None:
        """Take in a prompt."""
        self._add(folder, [(len(prompt.encode()), prompt[:_LENGTH])])

    def merge(self, other: LongestPrompts) -> None:
        """Take in those of another."""
        for folder, prompts in other.folders.items():
            self._add(folder, prompts)

    def _add(self, folder: str, prompts: list[tuple[int, str]]) -> None:
        listed = self.folders.setdefault(folder, [])
        is_full = len(listed) == _LISTED
        for prompt in prompts:
            if prompt not in listed and not (is_full and prompt[0] < listed[-1][0]):
                listed.append(prompt)
                listed.sort(key=lambda entry: (-entry[0], entry[1]))
                del listed[_LISTED:]

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """JSON values, for `from_json`."""
        return {
            folder: [{"bytes": size, "prompt": prompt} for size, prompt in prompts]
            for folder, prompts in sorted(self.folders.items())
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[Mapping[str, Any]]]) -> Self:
        """What `to_json` gave."""
        return cls(
            {
                folder: [(prompt["bytes"], prompt["prompt"]) for prompt in prompts]
                for folder, prompts in value.items()
            }
        )
