"""Pictures in files, folders, globs and buckets: where they are, and their pixels.

A picture that cannot be read is told and not raised, so that a run over many goes on.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_composer.images.pil import (
    FORMATS,
    GreyRangeError,
    ImageTooLargeError,
    describe_error,
    open_image,
    to_rgb,
)
from vlm_composer.local_files import is_hidden
from vlm_composer.outages import ride_out
from vlm_composer.storage import Store, open_store

log = logging.getLogger(__name__)

SUFFIXES = frozenset(
    suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS
)
"""How the names of images end, in lower case, in a folder or below a prefix."""
STORE_TIMEOUT = 60.0
"""Seconds that a bucket may be away."""


@dataclass(frozen=True)
class Picture:
    """A picture that has not been read yet.

    Attributes:
        name: Its path or URL.
        read: Returns its bytes.
    """

    name: str
    read: Callable[[], bytes]

    def open(self) -> Image.Image | str:
        """Return the picture, upright and in RGB, or what is wrong with it."""
        try:
            with open_image(self.read()) as image:
                return to_rgb(image)
        except Exception as error:  # PIL's decoders raise SyntaxError, ValueError, struct.error, …
            text = describe_error(error)
            if isinstance(error, OSError | ImageTooLargeError | GreyRangeError):
                return text  # a store or a file that cannot be read, and most bad images
            return f"not a readable image: {type(error).__name__}: {text}"


def find_pictures(places: Sequence[str]) -> Iterator[Picture]:
    """Find pictures, in the order of the places, those of a place by name.

    Args:
        places: Files, folders (with all below them), globs; the same of a bucket: `s3://b/a.png`,
            `s3://b/folder`, `s3://b/folder/*.png`.

    Yields:
        The pictures. A place without any is one that cannot be read.

    Raises:
        StoreError: A bucket cannot be listed, or its URL is malformed.
    """
    for place in places:
        yield from _in_bucket(place) if "://" in place else _on_disk(place)


def _on_disk(place: str) -> Iterator[Picture]:
    path = Path(place)
    if path.is_dir():
        files = [x for x in path.rglob("*") if x.is_file()]
        found = sorted(map(Path, _images_among(map(str, files), place)))
    elif path.exists() or not glob.has_magic(place):
        found = [path]
    else:
        found = [x for x in map(Path, sorted(glob.glob(place, recursive=True))) if x.is_file()]
    if not found:
        yield _none_at(place)
    for file in found:
        yield Picture(str(file), file.read_bytes)


def _in_bucket(place: str) -> Iterator[Picture]:
    scheme, _, rest = place.partition("://")
    bucket, _, key = rest.partition("/")
    store = open_store(f"{scheme}://{bucket}")
    key = key.rstrip("/")
    if glob.has_magic(key):
        names = [x for x in _names(store, key[: _first_magic(key)]) if fnmatch.fnmatch(x, key)]
    elif Path(key).suffix.lower() in SUFFIXES:
        names = [key]
    else:
        names = _images_among(_names(store, f"{key}/" if key else ""), place)
    if not names:
        yield _none_at(place)
    for name in names:
        yield Picture(f"{store.url}/{name}", lambda name=name: _download(store, name))  # type: ignore[misc]


def _images_among(names: Iterable[str], place: str) -> list[str]:
    """Return the names of images, and log how many others there are."""
    found, others = [], Counter[str]()
    for name in names:
        suffix = Path(name).suffix.lower()
        if is_hidden(name.removeprefix(place)):
            continue
        if suffix in SUFFIXES:
            found.append(name)
        else:
            others[suffix or "no suffix"] += 1
    if others:
        kinds = ", ".join(
            f"{count} × {suffix}"
            for suffix, count in sorted(others.items(), key=lambda x: (-x[1], x[0]))[:5]
        )
        log.warning(
            "%s: passed over %d files that are not images by their names (%s); name one to try it.",
            place, others.total(), kinds,
        )  # fmt: skip
    return found


def _names(store: Store, prefix: str) -> list[str]:
    return ride_out(lambda: store.names(prefix), f"list {store.url}/{prefix}", STORE_TIMEOUT)


def _first_magic(key: str) -> int:
    return min(key.index(character) for character in "*?[" if character in key)


def _download(store: Store, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture")
        ride_out(lambda: store.get(name, path), f"read {store.url}/{name}", STORE_TIMEOUT)
        return path.read_bytes()


def _none_at(place: str) -> Picture:
    def read() -> bytes:
        raise FileNotFoundError(f"there is no picture at {place}")

    return Picture(place, read)
