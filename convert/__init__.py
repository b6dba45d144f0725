"""LLaVA pairs → MDS shards. `python -m convert --help`, or `convert_llava` from Python."""

from convert.conversion import convert_llava
from convert.errors import ConversionError
from convert.summary import Summary

__all__ = ["ConversionError", "Summary", "convert_llava"]
