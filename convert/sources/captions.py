"""Captions as LLaVA items, and the decoding of text files."""

from __future__ import annotations

import codecs
import json
from typing import Any

from convert.errors import Reason, Rejected


def other_encoding(start: bytes) -> str | None:
    """Return the encoding of Unicode that a text's first 4 bytes show, where it is not UTF-8.

    A byte-order mark shows it, or the place of null bytes, which no text has in UTF-8 (RFC 4627).
    """
    found = json.detect_encoding(start[:4]) if len(start) > 3 or b"\0" not in start else "utf-8"
    return None if found.startswith("utf-8") else found[:6].upper()


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode a text file: UTF-8, without its byte-order mark.

    Raises:
        Rejected: It is of another encoding of Unicode.
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
