"""Captions as LLaVA items, and the decoding of text files."""

from __future__ import annotations

import codecs
from typing import Any

from convert.errors import Reason, Rejected

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def other_encoding(start: bytes) -> str | None:
    """Return the encoding that is not UTF-8 whose byte-order mark a file starts with."""
    return next((name for mark, name in _OTHER_MARKS.items() if start.startswith(mark)), None)


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode a text file: UTF-8, without its byte-order mark.

    Raises:
        Rejected: It is of another encoding by its byte-order mark.
        UnicodeDecodeError: It is not UTF-8.
    """
    if encoding := other_encoding(data):
        raise Rejected(Reason.NOT_UNICODE, f"a text of {encoding}: save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors)


def captioned(sample_id: object, image: str, caption: object) -> dict[str, Any]:
    """An item in which nothing is asked: its prompt becomes `<image>` alone.

    Args:
        sample_id: Its id.
        image: Its image's name.
        caption: What the answer is; the record says what is wrong with one that is no text.
    """
    turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": caption}]
    return {"id": sample_id, "image": image, "conversations": turns}
