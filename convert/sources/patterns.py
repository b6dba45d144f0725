"""Which files a folder, a pattern or a URL stands for."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from typing import Any

from convert.errors import ConversionError
from convert.sources.files import PATIENCE, is_url, list_bucket, stamp
from vlm_composer.listing import find_files
from vlm_composer.outages import StoreError

_MAX_FILES = 1_000_000
_braces = re.compile(r"\{([^{}]*)\}")
_numbers = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


def list_files(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a pattern stands for, each place's in the order of their names.

    Args:
        pattern: A file, a folder (with all that is below it), or a pattern of `*`, `?`, `[…]`,
            `{00000..00012}` and `{a,b}`; or a URL of such a form.
        suffixes: How the files' names end in a folder or a bucket.

    Raises:
        ConversionError: If there are none, or a part of a pattern of braces is missing.
    """
    places = [pattern] if os.path.exists(pattern) else _expand_braces(pattern)
    files = []
    for place in places:
        try:
            found, _ = find_files(place, lambda name: name.endswith(suffixes), PATIENCE)
        except StoreError as error:
            raise ConversionError(str(error)) from error
        if not found:
            raise ConversionError(
                f"{place}: no such file, and nothing named {' or '.join(suffixes)} below it or "
                "like it"
            )
        files += found
    return files


def stamp_files(files: list[str]) -> dict[str, Any]:
    """What changes when one of many files does, for `Source.fingerprint`."""
    stamps, total = hashlib.sha256(), 0
    listed: dict[str, dict[str, int]] = {}  # a bucket's folders: one request for many files
    for file in files:
        folder, _, name = file.rpartition("/")
        if is_url(file):
            listed[folder] = listed.get(folder) or list_bucket(folder)
            found: dict[str, Any] = {"bytes": listed[folder].get(name, -1)}
        else:
            found = stamp(file)
        total += found["bytes"]
        stamps.update(f"{file}\0{sorted(found.items())}\n".encode(errors="surrogateescape"))
    return {"files": len(files), "bytes": total, "stamps": stamps.hexdigest()}


def _expand_braces(pattern: str) -> list[str]:
    """`{00000..00012}` and `{a,b}`, as a shell has them."""
    parts, end, total = [], 0, 1
    for match in _braces.finditer(pattern):
        numbers = _numbers.fullmatch(match[1])
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            width = len(numbers[1]) if numbers[1].startswith("0") else 0
            total *= max(last - first + 1, 0)
        elif "," in match[1]:
            total *= match[1].count(",") + 1
        else:
            continue
        if not 0 < total <= _MAX_FILES:
            raise ConversionError(
                f"{pattern} stands for {total} files: give from 1 to {_MAX_FILES}, as in "
                "{00000..00012}"
            )
        choices = (
            [f"{number:0{width}}" for number in range(first, last + 1)]
            if numbers
            else match[1].split(",")
        )
        parts += [[pattern[end : match.start()]], choices]
        end = match.end()
    parts.append([pattern[end:]])
    return ["".join(chosen) for chosen in itertools.product(*parts)]
