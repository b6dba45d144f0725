"""Pairs of images and texts → MDS shards. `python -m convert --help`, or `convert_llava` and
`convert_pairs` from Python."""

from convert.conversion import convert_llava, convert_pairs
from convert.errors import ConversionError
from convert.summary import Summary

__all__ = ["ConversionError", "Summary", "convert_llava", "convert_pairs"]
