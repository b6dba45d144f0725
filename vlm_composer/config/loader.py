"""From a yaml file and `key=value` overrides to checked dataclasses.

Every mistake is found before anything is loaded and all of them are reported at once: unknown keys
(with the nearest valid one), missing keys, wrong types, values outside a fixed set. The schema
itself is `vlm_composer.config`; this module knows only dataclasses and type hints.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
Place = tuple[str | int, ...]
"""Keys of mappings and numbers of list items, from the top to a value."""
Texts = dict[Place, str]
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")
_MASK = "__from_the_environment__"
INTERNAL = {"internal": True}
"""Metadata of fields that are no keys of a yaml."""


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
    return typing.cast(dict[str, Any], data), dict(_environment_texts(merged, data))


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


def build(schema: type[T], data: dict[str, Any], path: str, errors: list[str]) -> T | None:
    """Build `schema` from `data`, appending one line to `errors` for each mistake.

    Args:
        schema: A dataclass type; nested dataclasses, `X | None`, `Literal`, `list[X]`,
            `tuple[X, …]`, `dict[str, X]`, str, int, float and bool are understood, and
            `Annotated[X, rule]`, whose `rule.expected` describes what it takes.
        data: The mapping at `path`.
        path: Dotted key of `data` in the file, empty at the top.
        errors: Extended in place.

    Returns:
        The instance, or None when `data` had a mistake.
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.metadata != INTERNAL}  # type: ignore[arg-type]
    before = len(errors)
    values: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            errors.append(f"{where}: unknown key{_nearest(str(key), fields)}")
            continue
        values[str(key)] = _convert(hints[str(key)], value, where, errors)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in data:
            errors.append(f"{path}.{name}: missing" if path else f"{name}: missing")
    return schema(**values) if len(errors) == before else None


def _nearest(key: str, valid: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid keys are {', '.join(valid)}"


def _convert(hint: Any, value: Any, where: str, errors: list[str]) -> Any:
    """Return `value` as `hint`, or append why it is not one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [a for a in arguments if a is not type(None)]
        if len(inner) == 1:
            return _convert(inner[0], value, where, errors)
        for candidate in inner:  # the first alternative that fits, e.g. int | str
            attempt: list[str] = []
            converted = _convert(candidate, value, where, attempt)
            if not attempt:
                return converted
        return _reject(where, " or ".join(_name(a) for a in inner), value, errors)
    if origin is Annotated:
        base, rule = arguments
        return value if type(value) is base else _reject(where, rule.expected, value, errors)
    if dataclasses.is_dataclass(hint):
        if value is None:  # `lr_monitor:` with nothing behind it means its defaults
            value = {}
        if not isinstance(value, dict):
            return _reject(where, "a mapping of keys to values", value, errors)
        return build(typing.cast(type, hint), value, where, errors)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        choices = ", ".join(repr(a) for a in arguments)
        hint_text = _nearest(value, arguments) if isinstance(value, str) else ""
        errors.append(f"{where}: {value!r} is not one of {choices}{hint_text.partition(';')[0]}")
        return None
    if origin in (list, tuple):
        if not isinstance(value, list):
            return _reject(where, "a list", value, errors)
        if origin is tuple and arguments[-1] is not Ellipsis and len(value) != len(arguments):
            return _reject(where, f"a list of {len(arguments)} values", value, errors)
        inner = [arguments[0]] * len(value) if origin is list else list(arguments)
        items = [
            _convert(i, v, f"{where}[{n}]", errors)
            for n, (i, v) in enumerate(zip(inner, value, strict=False))
        ]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, dict):
            return _reject(where, "a mapping of keys to values", value, errors)
        return {str(k): _convert(arguments[1], v, f"{where}.{k}", errors) for k, v in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    return _reject(where, _name(hint), value, errors)


def _name(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, str(hint))


def _reject(where: str, expected: str, value: Any, errors: list[str]) -> None:
    errors.append(f"{where}: expected {expected}, got {value!r}")
