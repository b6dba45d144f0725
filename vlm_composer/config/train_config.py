"""The configuration of a run: the schema's values, read from a yaml and known to work together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from pydantic import InstanceOf
from pydantic.dataclasses import dataclass

from vlm_composer.config.checks import mistakes
from vlm_composer.config.loader import ConfigError, Texts, build, read_yaml
from vlm_composer.config.run import RunSettings

_SECRET_CHARACTERS = 4
"""Of a value from the environment that no message shows; shorter ones stand in any text."""


@dataclass
class TrainConfig(RunSettings):
    """A training run."""

    unresolved: InstanceOf[Texts] = field(default_factory=Texts, repr=False)
    """Texts of the values that the yaml takes from the environment, by their places."""

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read and check a yaml file.

        Args:
            path: The file.
            overrides: `key.sub=value` items.

        Returns:
            The configuration.

        Raises:
            ConfigError: With every mistake that was found.
        """
        errors: list[str] = []
        data, unresolved = read_yaml(path, overrides)
        config = build(cls, data, "", errors, constraints=True)
        # A value out of range does not hide combinations that cannot work.
        if (config := config or build(cls, data, "", [])) is not None:
            config.unresolved = unresolved
            errors += mistakes(config)
        if errors or config is None:
            raise ConfigError(str(path), [_without_values(e, data, unresolved) for e in errors])
        return config

    def recorded(self) -> dict[str, Any]:
        """Return the configuration for logs, checkpoints and reports, as plain values: what the
        yaml takes from the environment stands there as the yaml has it."""
        settings = asdict(self)
        del settings["unresolved"]
        for (*sections, name), text in self.unresolved.items():
            section: Any = settings
            for part in sections:
                section = section[part]
            section[name] = text
        return settings


def _without_values(error: str, data: dict[str, Any], unresolved: Texts) -> str:
    """Put the texts of values from the environment into a message in place of the values."""
    for place, text in unresolved.items():
        value: Any = data
        for part in place:
            value = value[part]
        error = error.replace(value, text) if len(value) >= _SECRET_CHARACTERS else error
    return error
