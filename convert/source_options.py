"""The options that name sources: the same for a conversion and for a preview of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from convert.errors import ConversionError
from convert.sources.opening import SourceSpec, read_sources_yaml


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Let a command line name one source, or a file of several."""
    add = parser.add_argument_group("where the pairs are (one of these)").add_argument
    add("--json", metavar="FILE", help="LLaVA JSON (a list of items) or .jsonl; needs --images")
    add("--parquet", metavar="FILES", help="Parquet file, folder, glob or URL")
    add("--webdataset", metavar="FILES", help="tar file, folder, glob or URL")
    add("--sources", metavar="FILE", help="YAML list of sources: name, and one of the above")
    add("--images", metavar="PLACE", help="folder, zip, tar or URL that image paths are in")


def specs_of(args: argparse.Namespace) -> list[SourceSpec]:
    """Tell which sources a command line names.

    Raises:
        ConversionError: If it names none, or several without `--sources`.
        OSError: If the file of `--sources` cannot be read.
    """
    given = {kind: getattr(args, kind) for kind in ("json", "images", "parquet", "webdataset")}
    if args.sources is None:
        return [SourceSpec(**given)]
    for option, value in given.items():
        if value is not None:
            raise ConversionError(f"--{option} has no use with --sources: name it in the file")
    return read_sources_yaml(Path(args.sources))
