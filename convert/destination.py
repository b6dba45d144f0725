"""Where a data set is written: a folder, or a prefix of an object store's bucket.

Either way files are written in a local `folder` first and then published. For a folder the two are
the same place; for a bucket `folder` is a staging area that each file leaves once it is uploaded.
Shards are published as they fill and the index files last, so a run that dies leaves no data set
that looks complete.
"""

import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from convert.errors import ConversionError
from vlm_composer.outages import StoreError, ride_out
from vlm_composer.storage import open_store

SUMMARY = "summary.json"
REJECTS = "rejects.jsonl"
_DATA_SET = re.compile(r"(train|eval)/(index\.json|features\.json|shard\.\d+\.mds)")

_UPLOAD_THREADS = 4
_PATIENCE = 60.0
"""Seconds that the store may be away during an upload."""

_UPLOADS_AHEAD = 8
"""Shards that may wait for their upload: with shards of 64 MB, staging takes at most 1 GB."""


class Destination(ABC):
    """A place for a data set.

    Args:
        out: The place as its user wrote it.
        folder: Where files are written before they are published.
    """

    def __init__(self, out: str, folder: Path) -> None:
        self.out = out
        self.folder = folder

    @abstractmethod
    def names(self) -> list[str]:
        """Everything below train/ and eval/, and the summary and the rejects where they exist."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes one of `names()`."""

    @abstractmethod
    def publish(self, name: str) -> None:
        """Makes a finished file of `folder` part of the destination; may return before it is."""

    @abstractmethod
    def wait(self) -> None:
        """Returns when all that was published is there. Raises ConversionError if it is not."""

    @abstractmethod
    def close(self) -> None:
        """Frees what it holds, published or not."""


class Folder(Destination):
    """A local folder, made where it is missing."""

    def __init__(self, out: str) -> None:
        # Absolute, because MDSWriter takes a relative path with a colon in it for a URL.
        super().__init__(out, Path(out).absolute())
        self.folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        below_sides = [
            path.relative_to(self.folder).as_posix()
            for side in ("train", "eval")
            for path in sorted((self.folder / side).rglob("*"))
            if not path.is_dir()
        ]
        return below_sides + [n for n in (SUMMARY, REJECTS) if (self.folder / n).exists()]

    def delete(self, name: str) -> None:
        (self.folder / name).unlink()

    def publish(self, name: str) -> None:
        assert (self.folder / name).is_file()

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Bucket(Destination):
    """A prefix in a bucket of S3, Google Cloud Storage or Azure Blob Storage.

    MDSWriter's own handling of a bucket is not used: in streaming 0.13 it queues shards without
    bound, uploads index.json while the last shards are still on their way and even if one of them
    failed, and cannot list or delete everywhere.

    Args:
        url: s3://bucket/prefix, gs://bucket/prefix or azure://container/prefix.

    Raises:
        ConversionError: If the URL is malformed or no credentials are found.
    """

    def __init__(self, url: str) -> None:
        with _as_conversion_error():
            self._store = open_store(url)
        self._staging = tempfile.TemporaryDirectory(prefix="convert-")
        super().__init__(url, Path(self._staging.name))
        self._threads = ThreadPoolExecutor(_UPLOAD_THREADS)
        self._uploads: deque[Future[None]] = deque()

    def names(self) -> list[str]:
        with _as_conversion_error(), self._store.named("list"):
            names = [
                name
                for start in ("train/", "eval/", SUMMARY, REJECTS)
                for name in self._store.names(start)
            ]
        return [
            name
            for name in names
            if name in (SUMMARY, REJECTS)
            or (
                name.startswith(("train/", "eval/")) and not name.endswith("/")
            )  # some stores list folders
        ]

    def delete(self, name: str) -> None:
        with _as_conversion_error(), self._store.named("delete from"):
            self._store.delete(name)

    def publish(self, name: str) -> None:
        while len(self._uploads) >= _UPLOADS_AHEAD:
            self._wait_for_oldest()
        self._uploads.append(self._threads.submit(self._upload, name))

    def wait(self) -> None:
        while self._uploads:
            self._wait_for_oldest()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._staging.cleanup()

    def _upload(self, name: str) -> None:
        path = self.folder / name
        ride_out(lambda: self._store.put(path, name), f"upload {name} to {self.out}", _PATIENCE)
        path.unlink()  # staging holds what is on its way, no more

    def _wait_for_oldest(self) -> None:
        with _as_conversion_error():
            self._uploads.popleft().result()


@contextmanager
def _as_conversion_error() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise ConversionError(str(error)) from error


def open_destination(out: str | Path) -> Destination:
    """A `Bucket` for a URL, a `Folder` for anything else."""
    out = os.fspath(out)
    return Bucket(out) if "://" in out else Folder(out)


def claim(destination: Destination, overwrite: bool) -> None:
    """Makes sure that the destination holds nothing that could be taken for part of this run.

    Args:
        destination: Where the data set will be written.
        overwrite: Delete an earlier data set. Files that no conversion writes are never deleted.

    Raises:
        ConversionError: If it holds a data set, whole or in part, and `overwrite` is off; or files
            below train/ or eval/ that are none of ours.
    """
    names = destination.names()
    data_set = [name for name in names if _DATA_SET.fullmatch(name)]
    foreign = sorted({*names} - {*data_set, SUMMARY, REJECTS})
    if foreign:
        raise ConversionError(
            f"{destination.out} holds {len(foreign)} files that no conversion wrote, such as "
            f"{foreign[0]}: remove them, or convert to another place"
        )
    if data_set and not overwrite:
        raise ConversionError(
            f"{destination.out} already holds {len(data_set)} files of a data set, such as "
            f"{data_set[0]}: give --overwrite to delete them, or convert to another place"
        )
    # The index files and the summary first: half deleted, it must not look complete.
    for name in sorted(names, key=lambda name: name.endswith(".mds")):
        destination.delete(name)


def delete_shards(destination: Destination) -> None:
    """Deletes what a failed run has published of its data set."""
    for name in destination.names():
        if _DATA_SET.fullmatch(name):
            destination.delete(name)
