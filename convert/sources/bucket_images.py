"""Images that are objects of a bucket."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from convert.errors import ConversionError, Reason, Rejected
from convert.sources.archive_index import composed, entry_name, missing, spellings
from convert.sources.files import PATIENCE, open_bucket, read_object
from convert.sources.image_stores import THREADS, ImageStore, in_window
from vlm_composer.local_files import is_hidden
from vlm_composer.outages import MissingFileError, StoreError, ride_out
from vlm_composer.storage import Store

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
        self._example: list[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": None}

    def check(self) -> None:
        store = open_bucket(self._url)
        try:
            if ride_out(store.first, f"list {self._url}", PATIENCE) is None:
                raise ConversionError(
                    f"{self._url}: no object's name starts like this; the images' names go on "
                    "from here"
                )
        except StoreError as error:
            raise ConversionError(str(error)) from error

    def fingerprint(self) -> dict[str, Any]:
        return {"bucket": self._url}

    def read(self, name: str) -> bytes:
        store = open_bucket(self._url)
        data = self._first_of(store, name)
        if len(data) > self._max_image_bytes:
            raise Rejected(
                Reason.TOO_LARGE, f"more bytes than a shard holds ({self._max_image_bytes})"
            )
        return data

    def _first_of(self, store: Store, name: str) -> bytes:
        """The object of a name, or of another spelling of it."""
        relative = name.removeprefix(self._url.rstrip("/") + "/")
        spelled = [entry_name(one) for one in spellings(relative)]
        others = [(composed(one), unicodedata.normalize("NFD", one)) for one in spelled]
        for key in dict.fromkeys([*spelled, *chain(*others)]):
            if len(key.encode()) > _MAX_NAME_BYTES:
                raise Rejected(
                    Reason.UNREADABLE_IMAGE, f"{name[:200]!r}…: no object's name is so long"
                )
            try:
                return read_object(store, key, self._max_image_bytes + 1)
            except MissingFileError:
                continue
        if self._example is None:
            first = ride_out(
                lambda: store.first(lambda key: not is_hidden(key)), f"list {self._url}", PATIENCE
            )
            self._example = [] if first is None else [first]
        raise missing(name, f"bucket {self._url}", self._example)

    def read_many(self, names: Iterable[str | Rejected]) -> Iterator[bytes | Rejected]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS)
        yield from in_window(self._threads, self.read, names)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
