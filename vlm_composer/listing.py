"""Which files a folder, a pattern or a URL stands for."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from vlm_composer.local_files import is_hidden
from vlm_composer.outages import StoreError, ride_out
from vlm_composer.storage import FolderStore, open_store

_wild = re.compile(r"[*?\[]")


def find_files(
    place: str, wanted: Callable[[str], bool], seconds: float
) -> tuple[list[str], list[str]]:
    """Find the files of a place. Those that a system keeps beside them (`is_hidden`) are left out.

    Args:
        place: A file, a folder (with all that is below it), or a pattern of `*`, `?`, `[…]`; or a
            URL of such a form, where `*` passes folders too.
        wanted: Tells by its name whether a file is one of those that a folder is searched for.
            What a pattern names is taken whatever it is.
        seconds: How long a bucket may be unavailable.

    Returns:
        The files in the order of their names, none where there are none; and what else lies in a
        folder.

    Raises:
        StoreError: A bucket cannot be listed, or its URL is malformed.
    """
    wild = None if os.path.exists(place) else _wild.search(place)
    base = place[: wild.start()] if wild else place
    if "://" in place:
        if wild is None and wanted(place):
            return [place], []
        names = _in_bucket(place, base, wild is not None, seconds)
    elif os.path.isdir(place):
        names = {str(Path(place, name)): name for name in FolderStore(place).sizes()}
    elif os.path.exists(place):
        return [place], []
    else:
        found = filter(os.path.isfile, glob.glob(place, recursive=True))
        names = {path: path.removeprefix(base) for path in found}
    files = sorted(path for path, name in names.items() if not is_hidden(name))
    if wild:
        return files, []
    return list(filter(wanted, files)), [path for path in files if not wanted(path)]


def _in_bucket(place: str, base: str, is_pattern: bool, seconds: float) -> dict[str, str]:
    """Return the URLs of objects, and what follows `base` in them."""
    folder = base.rpartition("/")[0] if is_pattern else base.rstrip("/")
    if folder.endswith(":/"):
        raise StoreError(f"{place}: a pattern cannot stand for the bucket's own name")
    store, start = open_store(folder), base.removeprefix(folder).lstrip("/")
    found = ride_out(lambda: store.names(start), f"list {folder}", seconds)
    urls = {f"{folder}/{name}": name.removeprefix(start) for name in found}
    return {url: urls[url] for url in urls if not is_pattern or fnmatch.fnmatchcase(url, place)}
