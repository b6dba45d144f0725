"""Write the reference of every key of a training yaml, `docs/config.md`, from the schema.

Usage: python -m vlm_composer.config.reference > docs/config.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from vlm_composer.config.run import RunSettings
from vlm_composer.config.section import bare, constraint_of, describe_type, keys_of
from vlm_composer.config.times import TimeRule

_HEAD = """# Keys of a training yaml

Generated from the schema in `vlm_composer/config/` by `python -m vlm_composer.config.reference`.
Edit the schema, not this page. `yamls/stage1.yaml` shows the keys in use. Any key can be overridden
on the command line as `key.sub=value`. A *required* key has no default, an *empty* one is null. A
section written as `{}` takes the defaults of its keys."""


def render() -> str:
    """Return the reference as Markdown: one table a section, one row a key."""
    sections: dict[type, list[str]] = {}
    for key, section in _sections(RunSettings, ""):
        sections.setdefault(section, []).append(key)
    return "\n\n".join([_HEAD, *(_table(*item) for item in sections.items())]) + "\n"


def documentation_of(section: type) -> dict[str, str]:
    """Return the docstring below each field of a section, those of its base classes too."""
    found: dict[str, str] = {}
    for part in reversed(section.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        for field, text in pairwise(typing.cast(ast.ClassDef, definition).body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = _one_line(ast.literal_eval(text.value))
    return found


def _sections(section: type, key: str) -> Iterator[tuple[str, type]]:
    """Yield a section and those below it, with their dotted keys."""
    yield key, section
    for name, hint in keys_of(section).items():
        inner, below = bare(hint), f"{key}.{name}".lstrip(".")
        if typing.get_origin(inner) is dict:
            inner, below = typing.get_args(inner)[-1], f"{below}.NAME"
        if dataclasses.is_dataclass(inner) and keys_of(typing.cast(type, inner)):
            yield from _sections(typing.cast(type, inner), below)


def _table(section: type, keys: list[str]) -> str:
    title = ", ".join(f"`{key}`" for key in keys) if keys[0] else "Top level"
    documentation = documentation_of(section)
    defaults = {field.name: _default(field) for field in dataclasses.fields(section)}
    rows = [
        f"| `{name}` | {_value(hint)} | {defaults[name]} | {documentation[name]} |"
        for name, hint in keys_of(section).items()
    ]
    head = "| key | value | default | meaning |\n| --- | --- | --- | --- |"
    return "\n".join([f"## {title}\n\n{_one_line(inspect.getdoc(section))}\n", head, *rows])


def _value(hint: Any) -> str:
    inner = bare(hint)
    if dataclasses.is_dataclass(inner):
        return "a section"
    if any(map(dataclasses.is_dataclass, typing.get_args(inner))):
        return "sections by name"
    constraint, text = constraint_of(hint), describe_type(hint)
    if isinstance(constraint, TimeRule):
        return f"{text}, in {', '.join(constraint.units)}"
    return f"{text}, {constraint.expected}" if constraint else text


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "*required*"
    if value is None:
        return "*empty*"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip().replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
