"""Where a data set is written: a folder, or a prefix of an object store's bucket.

Either way files are written in a `staging` folder first and then published, by a few threads while
the next ones are made: moved to where they belong, or uploaded. A published file is there under its
name whole, or not at all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from convert.errors import ConversionError
from convert.staging import Scratch, lock_destination
from vlm_composer.local_files import move_durably
from vlm_composer.locks import Lock, user_folder
from vlm_composer.mds.json_object import MAX_JSON_BYTES
from vlm_composer.outages import StoreError, ride_out
from vlm_composer.storage import FolderStore, Store, open_store

SUMMARY = "summary.json"
REJECTS = "rejects.jsonl"
QUALITY = "quality.json"
JOURNAL = ".convert"
"""The folder of what an unfinished conversion needs to go on."""

UPLOADS_AHEAD = 3
"""Shards of a worker that may be on their way. One more waits for them, and the next is made in
memory: staging takes at most four shards a worker, 256 MB with shards of 64 MB."""

_THREADS = 2
_PATIENCE = 60.0
"""Seconds that the store may be away."""


class Destination(ABC):
    """A place for a data set, that processes share.

    It can be sent to other processes, and opens what it needs in each of them.

    Args:
        out: The place as its user wrote it.
        staging: A folder of the local disk, where files are written before they are published.
    """

    def __init__(self, out: str, staging: Path) -> None:
        self.out = out
        self.staging = staging
        self._store: Store | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._underway: deque[Future[None]] = deque()
        self._lock: Lock | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"out": self.out, "staging": self.staging}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Destination.__init__(self, state["out"], state["staging"])

    @abstractmethod
    def lock(self) -> None:
        """Keep other processes out until `close`.

        Raises:
            ConversionError: One is there already.
        """

    @abstractmethod
    def local(self, name: str) -> Path:
        """Where a file that was published can be read on the local disk, as often as needed."""

    def keep(self, path: Path, name: str) -> None:
        """Publish a file at once, whatever else is on its way, and have it `local` as well."""
        self._publish_now(path, name)

    @abstractmethod
    def _put(self, path: Path, name: str) -> None:
        """Take a file of `staging` to its place."""

    def publish(self, path: Path, name: str) -> Future[None]:
        """Take a finished file to its place; may return before it is there.

        Args:
            path: The file, in `staging`. It is gone once it is published.
            name: Where it belongs, relative to the destination, with `/`.

        Returns:
            What is done once the file is there, or raises a ConversionError.
        """
        while len(self._underway) >= UPLOADS_AHEAD:
            self._underway.popleft().result()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS)
        self._underway.append(self._threads.submit(self._publish_now, path, name))
        return self._underway[-1]

    def wait(self) -> None:
        """Returns when all that this process published is there.

        Raises:
            ConversionError: If something could not be published.
        """
        while self._underway:
            self._underway.popleft().result()

    def stage(self, name: str) -> Path:
        """Where to write a file before it is published; its folder is made."""
        path = self.staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def names(self, prefix: str) -> list[str]:
        """The files whose names start with a prefix, sorted; what is staged is none of them."""
        with _as_conversion_error(), self.store.named("list"):
            return self.store.names(prefix)

    def read(self, name: str) -> bytes | None:
        """A small file's content, or more of it than is parsed; None where there is none."""
        if name not in self.names(name):
            return None
        with self.local(name).open("rb") as file:
            return file.read(MAX_JSON_BYTES + 1)

    def check_inside(self, names: Iterable[str]) -> None:
        """Refuse to delete files that lie elsewhere, behind a link; buckets have none.

        Raises:
            ConversionError: A folder of one of them does.
        """
        del names

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with _as_conversion_error():
            what = f"delete {name} from {self.out}"
            ride_out(lambda: self.store.delete(name), what, _PATIENCE)

    @property
    def store(self) -> Store:
        """Opened once in each process."""
        if self._store is None:
            with _as_conversion_error():
                self._store = open_store(self.out)
        return self._store

    def close(self) -> None:
        """End what it has under way, published or not, and free what it holds."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _publish_now(self, path: Path, name: str) -> None:
        with _as_conversion_error():
            self._put(path, name)


class Folder(Destination):
    """A local folder, made where it is missing. Its staging lies in it, so that files are moved.

    Each run has a staging of its own: workers of one that was killed end by themselves, but perhaps
    only after the next has begun.
    """

    def __init__(self, out: str) -> None:
        # Absolute, so that it is the same for a process in another working folder.
        self.folder = Path(out).absolute()
        super().__init__(out, self._all_staging / uuid4().hex)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.folder = self.staging.parents[2]

    @property
    def _all_staging(self) -> Path:
        return self.folder / JOURNAL / "staging"

    def stage(self, name: str) -> Path:
        if not (self.folder / JOURNAL / "lock").exists():  # which `lock` has made
            raise ConversionError(
                f"{self.folder} on {platform.node()} is not the folder that this conversion began "
                "in: with an engine of several machines, give a bucket or a folder that all of "
                "them share"
            )
        return super().stage(name)

    def lock(self) -> None:
        try:
            (self.folder / JOURNAL).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConversionError(f"{self.out} is no folder, or lies in a file: {error}") from error
        for path in (self.folder / JOURNAL, self._all_staging):
            if path.is_symlink():
                raise ConversionError(
                    f"{path} is a link to {path.resolve()}: remove it, or convert to another place"
                )
        self._lock = lock_destination(self.folder / JOURNAL / "lock", self.out)
        shutil.rmtree(self._all_staging, ignore_errors=True)  # of a killed run

    @property
    def store(self) -> Store:
        return FolderStore(os.fspath(self.folder))

    def names(self, prefix: str) -> list[str]:
        # Only below what is asked for: a destination may be the top of a large tree.
        below = FolderStore(os.fspath(self.folder / prefix))
        if (self.folder / prefix).is_file():
            return [prefix]
        found = [f"{prefix.rstrip('/')}/{name}" for name in below.names()]
        ours = (f"{JOURNAL}/staging/", f"{JOURNAL}/lock")
        return [name for name in found if not name.startswith(ours)]

    def check_inside(self, names: Iterable[str]) -> None:
        top = self.folder.resolve()
        for folder in sorted({(self.folder / name).parent for name in names}):
            if not (found := folder.resolve()).is_relative_to(top):
                raise ConversionError(
                    f"{folder} leads to {found}, outside {self.out}, where nothing is deleted: "
                    "remove the link, or convert to another place"
                )

    def local(self, name: str) -> Path:
        return self.folder / name

    def _put(self, path: Path, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        move_durably(path, target)
        if target.suffix == ".mds":
            _drop_from_memory(target)

    def close(self) -> None:
        super().close()
        if self._lock is None:
            return  # what is here is another's
        shutil.rmtree(self._all_staging, ignore_errors=True)
        self._lock.release()
        with suppress(OSError):  # a journal is kept
            (self.folder / JOURNAL).rmdir()


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
            store = open_store(url)
        self._scratch = Scratch()
        super().__init__(url, self._scratch.folder)
        self._store = store

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.staging.exists():  # on another machine than the one that made it
            self.staging = Path(tempfile.gettempdir(), self.staging.name)

    def lock(self) -> None:
        # No store has locks. This keeps out what is started twice on one machine.
        of = hashlib.sha256(self.out.rstrip("/").encode()).hexdigest()[:16]
        self._lock = lock_destination(user_folder() / f"convert-to-{of}.lock", self.out)

    def local(self, name: str) -> Path:
        path = self.stage(f"local/{name}")
        if not path.exists():
            what = f"download {name} from {self.out}"
            with _as_conversion_error():
                ride_out(lambda: self.store.get(name, path), what, _PATIENCE)
        return path

    def keep(self, path: Path, name: str) -> None:
        copy = self.stage(f"local/{name}")
        copy.unlink(missing_ok=True)
        copy.hardlink_to(path)
        super().keep(path, name)

    def _put(self, path: Path, name: str) -> None:
        ride_out(lambda: self.store.put(path, name), f"upload {name} to {self.out}", _PATIENCE)
        path.unlink()  # staging holds what is on its way, no more

    def close(self) -> None:
        super().close()
        self._scratch.close()
        if self._lock is not None:
            self._lock.release()


def _drop_from_memory(path: Path) -> None:
    """Have the kernel use a file's pages for the next one, not keep them.

    Nobody reads a shard soon; the source, which is read twice, should stay; and pages that were in
    use just now cost less than new ones, above all on a virtual machine.

    Args:
        path: A file that is on the disk in full.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


@contextmanager
def _as_conversion_error() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise ConversionError(str(error)) from error


@contextmanager
def open_destination(out: str | Path) -> Iterator[Destination]:
    """Open a destination and keep others out of it: a `Bucket` for a URL, else a `Folder`.

    Raises:
        ConversionError: Another process writes there, or a URL is malformed.
        OSError: The folder cannot be made.
    """
    out = os.fspath(out)
    destination: Destination = Bucket(out) if "://" in out else Folder(out)
    try:
        destination.lock()
        yield destination
    finally:
        destination.close()
