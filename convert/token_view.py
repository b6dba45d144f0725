"""A sample token by token: what the model reads of it, and what it is asked to say.

The tokens and the mask are those of training's own `Template`; here they are put into words.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from vlm_composer.data.schema import Record
from vlm_composer.data.template import Template
from vlm_composer.models.packing import IGNORE_INDEX
from vlm_composer.plain_text import plain

Role = Literal["prompt", "image", "loss", "cut"]
"""What becomes of a token: it is read, it is a place for the image's, it is read and bears loss, or
it is beyond max_seq_len."""

_COLOURS: dict[Role, str] = {"prompt": "2", "image": "36", "loss": "1;32", "cut": "9;31"}
"""Codes of a terminal: dim, cyan, bold green, struck out in red."""

_LABEL = 10  # characters
_SEPARATOR = "|"


@dataclass(frozen=True)
class Token:
    """A token of a sample."""

    id: int
    text: str
    role: Role


class TokenView:
    """Tells the tokens of samples.

    Args:
        template: Training's.
        add_bos: As the template was made with.
    """

    def __init__(self, template: Template, add_bos: bool | None) -> None:
        self._template = template
        self._endless = Template(
            template.tokenizer,
            num_image_tokens=template.num_image_tokens,
            max_seq_len=sys.maxsize,
            add_bos=add_bos,
        )

    def tokens(self, record: Record) -> list[Token]:
        """The tokens of a record, those that are cut among them.

        Raises:
            ValueError: If training could not use it.
        """
        kept = self._template.encode(record["prompt"], record["answer"])
        ids = self._endless.encode(record["prompt"], record["answer"]).input_ids
        roles: list[Role] = [
            "image"
            if token == self._template.image_token_id
            else "prompt"
            if label == IGNORE_INDEX
            else "loss"
            for token, label in zip(kept.input_ids, kept.labels, strict=True)
        ]
        roles += ["cut"] * (len(ids) - len(roles))
        return [
            Token(token, self._text(ids, index), role)
            for index, (token, role) in enumerate(zip(ids, roles, strict=True))
        ]

    def _text(self, ids: Sequence[int], index: int) -> str:
        """What a token adds to the text: some tokenizers drop the space before a first word."""
        tokenizer = self._template.tokenizer
        before, with_it = (
            tokenizer.decode(ids[max(index - 1, 0) : end], clean_up_tokenization_spaces=False)
            for end in (index, index + 1)
        )
        text = with_it.removeprefix(before) if with_it.startswith(before) else "\ufffd"
        # Part of a character has no text, but it has a name.
        return tokenizer.convert_ids_to_tokens(ids[index]) if "\ufffd" in text else text


def draw_tokens(tokens: Sequence[Token], *, width: int, colours: bool) -> Iterator[str]:
    """Draw the mask: a line, or several, for each run of tokens that share a role.

    Args:
        tokens: Of a sample.
        width: Characters of a line.
        colours: Colour them, for a terminal.
    """
    for role, run in groupby(tokens, key=lambda token: token.role):
        label = {"prompt": "no loss", "image": "no loss"}.get(role, role)
        for number, line in enumerate(_wrap(_names(list(run)), width - _LABEL)):
            shown = f"\x1b[{_COLOURS[role]}m{line}\x1b[0m" if colours else line
            yield f"{label if number == 0 else '':<{_LABEL}}{shown}"


def _names(run: Sequence[Token]) -> list[str]:
    if run[0].role == "image":
        return [f"{run[0].text} × {len(run)}"]
    return [plain(token.text) for token in run]


def _wrap(names: Sequence[str], width: int) -> Iterator[str]:
    line = names[0]
    for name in names[1:]:
        if len(line) + len(name) + len(_SEPARATOR) > width:
            yield line + _SEPARATOR
            line = name
        else:
            line += _SEPARATOR + name
    yield line
