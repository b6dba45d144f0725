"""The record that `convert/` writes and `vlm_composer/data/` reads: all that the two share.

Nothing heavy is imported here, so that conversion needs no model code.
"""

from typing import TypedDict

IMAGE_PLACEHOLDER = "<image>"
"""Stands in a prompt, exactly once, where the image's tokens will go."""

MDS_COLUMNS = {"id": "str", "image": "bytes", "prompt": "str", "answer": "str"}
"""Column name → MDS encoding, one column for each field of :class:`Record`."""

IMAGE_COLUMNS = ("image", "patches")
"""Under which of these a record holds its image: as it was published, or what the frozen vision
tower made of it (see `features`)."""


class Record(TypedDict):
    """One sample: an image and what is asked and answered about it.

    Text is stored, not tokens, and the image as it was published, so that the tokenizer, the
    image size and the loss mask are still open when training starts.
    """

    id: str
    """The source's id. It names the sample in messages; it need not be unique."""

    image: bytes
    """The original file (JPEG, PNG, …), byte for byte."""

    prompt: str
    """The first human turn, with one :data:`IMAGE_PLACEHOLDER`."""

    answer: str
    """The first gpt turn. The only text that the loss is taken on."""
