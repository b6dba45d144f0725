"""Pictures in files, folders, globs and buckets: where they are, and their pixels.

A picture that cannot be read is told and not raised, so that a run over many goes on.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from vlm_composer.listing import find_files
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
        names, others = find_files(place, _is_image, STORE_TIMEOUT)
        if others:
            kinds = Counter(Path(name).suffix.lower() or "no suffix" for name in others)
            counts = sorted(kinds.items(), key=lambda x: (-x[1], x[0]))[:5]
            log.warning(
                "%s: passed over %d files that are not images by their names (%s); name one to try "
                "it.",
                *(place, len(others), ", ".join(f"{count} × {kind}" for kind, count in counts)),
            )
        if not names:
            yield _none_at(place)
        bucket = "/".join(place.split("/", 3)[:3])  # scheme://bucket
        store = open_store(bucket) if "://" in place else None
        for name in names:
            key = name.removeprefix(f"{bucket}/")
            yield Picture(name, partial(_download, store, key) if store else Path(name).read_bytes)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _download(store: Store, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture")
        ride_out(lambda: store.get(name, path), f"read {store.url}/{name}", STORE_TIMEOUT)
        return path.read_bytes()


def _none_at(place: str) -> Picture:
    def read() -> bytes:
        raise FileNotFoundError(f"there is no picture at {place}")

    return Picture(place, read)
