"""What every section of the schema has in common, and the constraints that stand beside its fields.

A section is a pydantic dataclass: types are strict, and an unknown key is a mistake.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from types import UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

TYPES_ONLY = "types only"
"""Validation context in which no `Constraint` is looked at."""

Name = Annotated[str, BeforeValidator(str)]
"""Key of a mapping; yaml reads some, such as 1, as another type."""


class Section:
    """Base of the schema's dataclasses."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, build: GetCoreSchemaHandler) -> CoreSchema:
        schema = build(source)
        if schema["type"] != "dataclass":
            return schema  # built before
        typing.cast(dict[str, Any], schema)["strict"] = False  # takes a mapping
        return core_schema.no_info_before_validator_function(_defaults_where_empty, schema)


def _defaults_where_empty(value: Any) -> Any:
    return {} if value is None else value


class Constraint:
    """What a field takes beside its type; stands in its `Annotated`."""

    expected: str
    """What works, as in "at least 1"."""
    replaces_type = False
    """Whether `expected` says what the type says as well."""

    def fault_of(self, value: Any) -> str | None:
        """Return the value and what is wrong with it; None where it works."""
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: Any, build: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._validate, build(source))

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> Any:
        fault = None if info.context == TYPES_ONLY else self.fault_of(value)
        if fault is not None:
            raise PydanticCustomError("constraint", "{fault}", {"fault": fault})
        return value


@dataclass(frozen=True)
class Bounds(Constraint):
    """What numbers a field takes.

    Attributes:
        expected: What works, as in "at least 1".
        fault: What is said of a value that does not, as in "is less than 1".
        works: Whether a value does.
    """

    expected: str
    fault: str
    works: Callable[[Any], bool]

    def fault_of(self, value: Any) -> str | None:
        if isinstance(value, str) or self.works(value):  # a word beside numbers, as `auto`
            return None
        return f"{list(value) if isinstance(value, tuple) else value} {self.fault}"


def at_least(least: int) -> Bounds:
    """Return a lower bound."""
    return Bounds(f"at least {least}", f"is less than {least}", lambda value: not value < least)


POSITIVE = Bounds("greater than 0", "is not a positive number", lambda value: 0 < value < inf)
SHARE = Bounds("from 0 to 1", "is not between 0 and 1", lambda value: 0 <= value <= 1)


def keys_of(section: type) -> dict[str, Any]:
    """Return the type of each key of a section as it is annotated."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in fields(section) if field.repr}


def bare(hint: Any) -> Any:
    """Return a type without its constraints and without the None of an empty value."""
    arguments = [one for one in typing.get_args(hint) if one is not type(None)]
    origin = typing.get_origin(hint)
    if origin is Annotated or (origin in (Union, UnionType) and len(arguments) == 1):
        return bare(arguments[0])
    return hint


def constraint_of(hint: Any) -> Constraint | None:
    """Return the constraint of a type, if it has one."""
    inside = (*getattr(hint, "__metadata__", ()), *map(constraint_of, typing.get_args(hint)))
    return next((one for one in inside if isinstance(one, Constraint)), None)


def describe_type(hint: Any) -> str:
    """Return what values of a type are, as in "a whole number or 'auto'"."""
    if (constraint := constraint_of(hint)) is not None and constraint.replaces_type:
        return constraint.expected
    hint = bare(hint)
    arguments = [one for one in typing.get_args(hint) if one is not type(None)]
    origin = typing.get_origin(hint)
    if origin in (Literal, Union, UnionType):
        return " or ".join(repr(a) if origin is Literal else describe_type(a) for a in arguments)
    if origin in (list, tuple):
        return f"a list of {len(arguments)} values" if origin is tuple else "a list"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, "a mapping of keys to values")
