"""Images that are objects of a bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from convert.errors import ConversionError, Reason, Rejected
from convert.sources.archive_index import entry_name
from convert.sources.files import PATIENCE, open_bucket, read_object
from convert.sources.image_stores import THREADS, ImageStore, in_window
from vlm_composer.outages import MissingFileError, StoreError, ride_out

_MAX_NAME_BYTES = 900
"""No store takes a key of more than 1024, the prefix included: it would refuse the request."""


class BucketImages(ImageStore):
    """The objects below a prefix of a bucket.

    Args:
        url: s3://bucket/prefix, gs://bucket/prefix or azure://container/prefix.
        max_image_bytes: Larger images are rejected, and no more of them is read than that.
    """

    def __init__(self, url: str, max_image_bytes: int) -> None:
        self._url = url
        self._max_image_bytes = max_image_bytes
        self._threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": None}

    def check(self) -> None:
        store = open_bucket(self._url)
        try:
            if not ride_out(store.any, f"list {self._url}", PATIENCE):
                raise ConversionError(
                    f"{self._url}: no object's name starts like this; the images' names go on "
                    "from here"
                )
        except StoreError as error:
            raise ConversionError(str(error)) from error

    def fingerprint(self) -> dict[str, Any]:
        return {"bucket": self._url}

    def read(self, name: str) -> bytes:
        store, key = open_bucket(self._url), entry_name(name)
        if len(key.encode()) > _MAX_NAME_BYTES:
            raise Rejected(Reason.UNREADABLE_IMAGE, f"{name[:200]!r}…: no object's name is so long")
        try:
            data = read_object(store, key, self._max_image_bytes + 1)
        except MissingFileError as error:
            raise Rejected(
                Reason.MISSING_IMAGE, f"no object {name[:200]!r} in {self._url}"
            ) from error
        if len(data) > self._max_image_bytes:
            raise Rejected(
                Reason.TOO_LARGE, f"more bytes than a shard holds ({self._max_image_bytes})"
            )
        return data

    def read_many(self, names: Iterable[str | Rejected]) -> Iterator[bytes | Rejected]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS)
        yield from in_window(self._threads, self.read, names)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
