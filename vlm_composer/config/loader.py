"""From a yaml file and `key=value` overrides to checked dataclasses.

Every mistake is found before anything is loaded and all of them are reported at once: unknown keys
(with the nearest valid one), missing keys, wrong types, values outside a fixed set or range.
pydantic finds them; this module says where in the yaml they are and what works there.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from vlm_composer.config.section import TYPES_ONLY, bare, describe_type, keys_of

T = TypeVar("T")
Place = tuple[str | int, ...]
"""Keys of mappings and numbers of list items, from the top to a value."""
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")
_MASK = "__from_the_environment__"


class Texts(dict[Place, str]):
    """What a yaml has in place of values from the environment, by their places."""


class ConfigError(ValueError):
    """The yaml or an override is not usable. Its text lists every mistake, one a line."""

    def __init__(self, source: str, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        count = "1 mistake" if len(self.errors) == 1 else f"{len(self.errors)} mistakes"
        super().__init__(
            f"{source}: {count}\n" + "\n".join(f"  - {error}" for error in self.errors)
        )


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Texts]:
    """Read a yaml file and merge `key.sub=value` overrides into it.

    Args:
        path: The yaml file. OmegaConf interpolations (`${run_name}`, `${oc.env:HOME}`) are
            resolved.
        overrides: Dot-list items as typed on the command line; values are parsed as yaml.

    Returns:
        Plain dicts, lists and scalars; and by its place the text of each value that comes from the
        environment (`${oc.env:NAME}`): it may be a secret, and the text is what is recorded.

    Raises:
        ConfigError: The file is missing or is not a yaml mapping, an override is not `key=value`,
            or an interpolation cannot be resolved.
    """
    if not Path(path).is_file():
        raise ConfigError(str(path), ["the file does not exist"])
    if malformed := [item for item in overrides if "=" not in item or item.startswith(("-", "="))]:
        raise ConfigError(
            str(path), [f"override {item!r} is not of the form key=value" for item in malformed]
        )
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        data = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(str(path), [str(error).replace("\n", " ")]) from error
    except Exception as error:  # yaml's own errors share no base class with OmegaConf's
        raise ConfigError(str(path), [f"not valid yaml: {error}"]) from error
    if not isinstance(data, dict):
        raise ConfigError(str(path), ["the file is not a mapping of keys to values"])
    return typing.cast(dict[str, Any], data), Texts(_environment_texts(merged, data))


def _environment_texts(merged: Any, data: Any) -> Iterator[tuple[Place, str]]:
    raw = OmegaConf.to_container(merged, resolve=False)
    masked = raw
    with suppress(OmegaConfBaseException):  # where one stands in an argument of another resolver
        masked = OmegaConf.to_container(OmegaConf.create(_mask(raw)), resolve=True)
    if _mask(raw) != raw:
        yield from _different_texts(masked, data, ())


def _mask(value: Any) -> Any:
    """Put something in place of what takes a value from the environment, to resolve all else."""
    if isinstance(value, dict):
        return {key: _mask(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mask(inner) for inner in value]
    return _FROM_ENVIRONMENT.sub(_MASK, value) if isinstance(value, str) else value


def _different_texts(masked: Any, data: Any, path: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(data, dict) and isinstance(masked, dict):
        for key in data:
            yield from _different_texts(masked.get(key), data[key], (*path, key))
    elif isinstance(data, list) and isinstance(masked, list):
        for number, pair in enumerate(zip(masked, data, strict=False)):
            yield from _different_texts(*pair, (*path, number))
    elif isinstance(masked, str) and masked != data and (isinstance(data, str) or "${" in masked):
        yield path, masked.replace(_MASK, "${oc.env:")


def build(
    schema: type[T], data: Any, path: str, errors: list[str], *, constraints: bool = False
) -> T | None:
    """Build `schema` from `data`, appending one line to `errors` for each mistake.

    Args:
        schema: A section of the schema.
        data: The mapping at `path`.
        path: Dotted key of `data` in the file, empty at the top.
        errors: Extended in place.
        constraints: Look at ranges and times, and not only at keys and types.

    Returns:
        The instance, or None when `data` had a mistake.
    """
    context = None if constraints else TYPES_ONLY
    try:
        return TypeAdapter(schema).validate_python(data, context=context)
    except ValidationError as error:
        lines = [_message(schema, path, one) for one in error.errors(include_url=False)]
        errors += dict.fromkeys(lines)  # pydantic has an error for each alternative of a union
        return None


def _message(schema: type, path: str, error: ErrorDetails) -> str:
    kind, value = error["type"], error["input"]
    hint: Any = schema
    keys: dict[str, Any] = {}
    for part in error["loc"]:  # ends with the alternative that failed where the type is a union
        inner = bare(hint)
        origin, arguments = typing.get_origin(inner), typing.get_args(inner)
        if dataclasses.is_dataclass(inner):
            keys = keys_of(typing.cast(type, inner))
            hint = keys.get(str(part))
        elif origin in (dict, list) or (origin is tuple and kind != "missing"):
            hint = arguments[-1]
        else:
            break
        item = f"[{part}]" if origin in (list, tuple) else f".{part}"
        path = f"{path}{item}" if path else str(part)
    if hint is None:
        return f"{path}: unknown key{_nearest(str(error['loc'][-1]), keys)}"
    if kind == "missing" and isinstance(error["loc"][-1], str):
        return f"{path}: missing"
    if kind == "constraint":
        return f"{path}: {error['msg']}"
    if typing.get_origin(inner := bare(hint)) is Literal:
        choices = ", ".join(map(repr, typing.get_args(inner)))
        return f"{path}: {value!r} is not one of {choices}"
    value = list(value) if isinstance(value, tuple) else value
    return f"{path}: expected {describe_type(hint)}, got {value!r}"


def _nearest(key: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid keys are {', '.join(valid)}"
