"""Pictures in files, folders, globs and buckets: where they are, and their pixels.

A picture that cannot be read is told and not raised, so that a run over many goes on.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_composer.data.pictures import to_rgb
from vlm_composer.outages import ride_out
from vlm_composer.storage import Store, open_store

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2"}
)
"""What is taken for a picture in a folder or below a prefix."""
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
            with Image.open(io.BytesIO(self.read())) as image:
                return to_rgb(image)
        except OSError as error:  # a store or a file that cannot be read, and most bad pictures
            return str(error)
        except Exception as error:  # PIL's decoders raise SyntaxError, ValueError, struct.error, …
            return f"not a readable picture: {type(error).__name__}: {error}"


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
        found = sorted(x for x in path.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())
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
        names = [
            name
            for name in _names(store, f"{key}/" if key else "")
            if Path(name).suffix.lower() in SUFFIXES
        ]
    if not names:
        yield _none_at(place)
    for name in names:
        yield Picture(f"{store.url}/{name}", lambda name=name: _download(store, name))  # type: ignore[misc]


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
