"""Templates of pages and model cards. Every text that they are given is escaped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vlm_composer.plain_text import plain

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|~&$@#:.]")


def html(value: Any) -> Any:
    """Return a text without what has no place in HTML; autoescape does the rest.

    A control character becomes `�`, half of a surrogate pair `?`.
    """
    if isinstance(value, Markup):
        return value
    return _CONTROL.sub("�", str(value).encode("utf-8", "replace").decode("utf-8"))


def markdown(value: Any) -> Markup:
    """Return a text as one line that has no meaning in Markdown, also not in GitHub's."""
    if isinstance(value, Markup):
        return value
    return Markup(_MARKDOWN.sub(r"\\\g<0>", plain(str(value))))


def load_templates(folder: Path, prepare: Callable[[Any], Any] = html) -> Environment:
    """Return the templates of a folder.

    Their filters are `bdi`, which keeps a text of unknown direction from turning its neighbours on
    a page, and `code` and `cell`, a code span of Markdown in a paragraph and in a table.

    Args:
        folder: With files `*.jinja`.
        prepare: `html` or `markdown`, called with every value before it is written.
    """
    templates = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=prepare,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(bdi=_bdi, code=_code, cell=_cell)
    return templates


def _bdi(value: Any) -> Markup:
    return Markup("<bdi>{}</bdi>").format(html(value))


def _code(value: Any) -> Markup:
    text = plain(str(value)) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # Readers take one space away at both ends.
    room = " " * (text.startswith(("`", " ")) or text.endswith(("`", " ")))
    return Markup(f"{fence}{room}{text}{room}{fence}")


def _cell(value: Any) -> Markup:
    return Markup(_code(value).replace("|", r"\|"))
