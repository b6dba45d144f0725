"""Where items and images come from: one file a kind of source."""

from convert.sources.llava_json import LlavaJson
from convert.sources.opening import SourceSpec, open_source, read_sources_yaml
from convert.sources.parquet import Parquet
from convert.sources.source import PIECE_ITEMS, Item, Piece, Source
from convert.sources.webdataset import WebDataset

__all__ = [
    "PIECE_ITEMS",
    "Item",
    "LlavaJson",
    "Parquet",
    "Piece",
    "Source",
    "SourceSpec",
    "WebDataset",
    "open_source",
    "read_sources_yaml",
]
