"""The label that takes no loss."""

IGNORE_INDEX = -100
"""Label of a position that takes no loss, as everywhere in Hugging Face and torch."""
