"""Where items and images come from: one file a kind of source."""

from convert.sources.llava_json import LlavaJson
from convert.sources.source import PIECE_ITEMS, Item, Piece, Source

__all__ = ["PIECE_ITEMS", "Item", "LlavaJson", "Piece", "Source"]
