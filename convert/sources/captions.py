"""Captions as LLaVA items."""

from __future__ import annotations

from typing import Any


def captioned(sample_id: object, image: str, caption: object) -> dict[str, Any]:
    """An item in which nothing is asked: its prompt becomes `<image>` alone.

    Args:
        sample_id: Its id.
        image: Its image's name.
        caption: What the answer is; the record says what is wrong with one that is no text.
    """
    turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": caption}]
    return {"id": sample_id, "image": image, "conversations": turns}
