"""From what a user names to sources: the options of the command line, or a `--sources` file."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from convert.errors import ConversionError
from convert.sources.llava_json import LlavaJson
from convert.sources.parquet import Parquet
from convert.sources.source import NAMING, Source, is_source_name
from convert.sources.webdataset import WebDataset

_KINDS = ("json", "parquet", "webdataset")


@dataclass(frozen=True)
class SourceSpec:
    """Where a source is: one of `json`, `parquet` and `webdataset`.

    Raises:
        ConversionError: If it is none of them or several, or one misses or has no use for images.
    """

    name: str = ""
    """What it is called among several, and its folder below the destination."""

    json: str | None = None
    """LLaVA JSON or JSON Lines."""

    images: str | None = None
    """Where the images of `json` are; or of `parquet`, where its rows hold only paths."""

    parquet: str | None = None
    """Parquet files."""

    webdataset: str | None = None
    """Tars."""

    def __post_init__(self) -> None:
        called = f"source {self.name!r}: " if self.name else ""
        given = {kind: getattr(self, kind) for kind in _KINDS if getattr(self, kind) is not None}
        if len(given) != 1:
            found = ", ".join(f"{kind} {place}" for kind, place in given.items()) or "none"
            raise ConversionError(
                f"{called}give one of {', '.join(_KINDS)}, not {found}; several sources go into "
                "a file for --sources"
            )
        if self.json is not None and self.images is None:
            raise ConversionError(
                f"{called}json {self.json} needs images: a folder, a zip, a tar or a bucket's URL"
            )
        if self.webdataset is not None and self.images is not None:
            raise ConversionError(
                f"{called}images {self.images} has no use with webdataset {self.webdataset}, whose "
                "tars hold the images: leave it out"
            )


def open_source(spec: SourceSpec, max_image_bytes: int) -> Source:
    """The source that a spec names. Whether it is there, `Source.files` tells.

    Args:
        spec: Where it is.
        max_image_bytes: Larger images are rejected.
    """
    if spec.json is not None:
        assert spec.images is not None
        return LlavaJson(spec.json, spec.images, max_image_bytes, spec.name)
    if spec.parquet is not None:
        return Parquet(spec.parquet, max_image_bytes, spec.name, spec.images)
    assert spec.webdataset is not None
    return WebDataset(spec.webdataset, max_image_bytes, spec.name)


def read_sources_yaml(path: str | Path) -> list[SourceSpec]:
    """Reads a `--sources` file.

    Example:
        - name: llava
          json: blip_laion_cc_sbu_558k.json
          images: images.zip
        - name: emoji
          parquet: s3://bucket/emoji/

    Args:
        path: A YAML list of `{name, json | parquet | webdataset, images}`. Paths are as if typed
            where the command is.

    Returns:
        Its sources, in its order.

    Raises:
        ConversionError: If it is not that, says what a source does not have, or calls two the same.
        OSError: If it cannot be read.
    """
    path = os.fspath(path)
    try:
        entries = yaml.safe_load(Path(path).read_bytes())
    except (yaml.YAMLError, UnicodeError, ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise ConversionError(
            f"{path} holds a {type(entries).__name__}, not a list of sources such as "
            "- {name: llava, json: pairs.json, images: images.zip}"
        )
    specs = [_spec(entry, f"{path}: source {number}") for number, entry in enumerate(entries, 1)]
    for spec in specs:
        # Two names that differ in case are one folder on some disks.
        same = [n for n, s in enumerate(specs, 1) if s.name.lower() == spec.name.lower()]
        if len(same) > 1:
            raise ConversionError(
                f"{path}: sources {same[0]} and {same[1]} are both called {spec.name}: "
                "each has a folder of its name, so call one of them otherwise"
            )
    return specs


def _spec(entry: Any, where: str) -> SourceSpec:
    if not isinstance(entry, dict):
        raise ConversionError(f"{where} is a {type(entry).__name__}, not name, json, images, …")
    known = [field.name for field in fields(SourceSpec)]
    for key, value in entry.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            meant = f"; did you mean {close[0]}?" if close else f": give {', '.join(known)}"
            raise ConversionError(f"{where}: unknown key {key!r}{meant}")
        if not isinstance(value, str) or not value:
            raise ConversionError(f"{where}: {key} is {value!r}, not text: put it in quotes")
    name = entry.get("name", "")
    if not is_source_name(name):
        raise ConversionError(
            f"{where}: name is {name!r}: it becomes a folder, so give one of {NAMING}"
        )
    try:
        return SourceSpec(**entry)
    except ConversionError as error:
        raise ConversionError(f"{where}: {error}") from None
