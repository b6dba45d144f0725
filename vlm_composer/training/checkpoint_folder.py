"""A run's checkpoints in a folder or a bucket: find the newest whole one, delete old ones."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from vlm_composer.local_files import move_durably, partial_path, remove_partials
from vlm_composer.outages import RefusedError, StoreError, best_effort, ride_out
from vlm_composer.storage import FolderStore, open_store
from vlm_composer.training.checkpoint_file import SUFFIX, CheckpointError, CheckpointFile
from vlm_composer.training.exported_connector import (
    FACTS_FILE,
    INDEX_FILE,
    ExportedConnector,
    connector_files,
)

log = logging.getLogger(__name__)

LATEST = "latest"
"""A small file with the name of the newest checkpoint, for people and scripts. A run looks at the
checkpoints themselves."""
_NUMBER = "(0|[1-9][0-9]{0,17})"
_NAME = re.compile(f"ep{_NUMBER}-ba{_NUMBER}{re.escape(SUFFIX)}")
"""Exactly what `checkpoint_name` returns: ASCII digits without leading zeros."""
ABANDONED_SECONDS = 24 * 3600.0
"""Uploads that began longer ago belong to killed processes: none takes a day."""


def checkpoint_name(epoch: int, batch: int) -> str:
    """The file name of a checkpoint."""
    return f"ep{epoch}-ba{batch}{SUFFIX}"


def checkpoints_among(names: Iterable[str]) -> list[str]:
    """Names of checkpoints, the newest first; other names are left out."""
    return sorted((name for name in names if _NAME.fullmatch(name)), key=_age, reverse=True)


class CheckpointFolder:
    """Checkpoints in a folder or a bucket. One process uses it.

    Args:
        url: A folder, or s3://bucket/prefix, gs://bucket/prefix, azure://container/prefix.
        scratch: A local folder for files on their way to and from a bucket.
        store_timeout: Seconds that a bucket may be away.
        keep: Newest whole checkpoints to keep; -1 keeps all.

    Raises:
        StoreError: The URL is malformed or no credentials are found.
    """

    def __init__(
        self, url: str, scratch: Path, *, store_timeout: float = 0, keep: int = -1
    ) -> None:
        self.url = url
        self.keep = keep
        self._whole: set[str] = set()  # what this process has read whole or saved
        self.store_timeout = store_timeout
        self._store = open_store(url)
        # A file in the store's own folder is moved into place, not copied.
        self.scratch = self._store.folder if isinstance(self._store, FolderStore) else scratch
        self.scratch.mkdir(parents=True, exist_ok=True)
        remove_partials(self.scratch)

    def names(self) -> list[str]:
        """Names of all checkpoints, the newest first."""
        found = ride_out(self._store.names, f"list {self.url}", self.store_timeout)
        return checkpoints_among(found)

    def scratch_path(self, name: str) -> Path:
        """Where to write the checkpoint `name` before it is added."""
        return partial_path(self.scratch / name)

    def add(self, path: Path, name: str) -> None:
        """Take a finished file over as the checkpoint `name`, point at it, and delete old ones.

        Deleted is only what is older than `keep` checkpoints that this process knows to be whole,
        of which `name` is the newest. What a name says of its file is not believed.

        Args:
            path: What `scratch_path` returned; it is gone afterwards.
            name: Of the checkpoint.

        Raises:
            StoreError: The store was away for too long, or cannot be written.
        """
        started = time.monotonic()
        size = path.stat().st_size
        self._put(path, name)
        self._whole.add(name)
        self._point_at(name)
        seconds = time.monotonic() - started
        log.info("Saved %s to %s (%.1f MB, %.1f s).", name, self.url, size / 1e6, seconds)
        if self.keep > 0:
            names = [other for other in self.names() if _age(other) <= _age(name)]
            kept = [other for other in names if other in self._whole][: self.keep]
            if len(kept) == self.keep:
                for old in names[names.index(kept[-1]) + 1 :]:
                    self._delete(old)

    def clear(self) -> None:
        """Delete every checkpoint."""
        for name in self.names():
            self._delete(name)

    def newest(self) -> CheckpointFile | None:
        """Fetch the newest whole checkpoint; None where there is none.

        Damaged ones and those that cannot be read are passed over with a warning.

        Raises:
            OSError: The store cannot be used, or none is whole and one could not be read.
        """
        unread: OSError | None = None
        for name in self.names():
            try:
                return self.fetch(name)
            except CheckpointError as error:
                log.warning("Passing over the checkpoint %s: %s.", name, error)
            except OSError as error:
                if isinstance(error, StoreError) and not isinstance(error, RefusedError):
                    raise  # it says nothing of this file: the store is unavailable, the disk full
                log.warning("Passing over the checkpoint %s: %s.", name, error)
                unread = unread or error
        if unread is not None:
            raise unread
        return None

    def abort_uploads(self) -> None:
        """Abort uploads of checkpoints that killed runs left unfinished a day ago or earlier.

        Only a run with this folder uploads such names, and a living one for less than a day.
        """
        with best_effort(f"abort unfinished uploads to {self.url}"):
            number = self._store.abort_uploads(_is_ours, ABANDONED_SECONDS)
            if number:
                log.info("Aborted %d unfinished uploads of killed runs to %s.", number, self.url)

    def fetch(self, name: str) -> CheckpointFile:
        """Open a checkpoint of a folder, or download one from a bucket to `scratch`.

        Raises:
            CheckpointError: It is damaged, or none of ours.
            StoreError: It cannot be read.
        """
        if isinstance(self._store, FolderStore):
            checkpoint = CheckpointFile(self._store.folder / name)
        else:
            path = self.scratch_path(name)
            try:
                self._get(name, path)
                checkpoint = CheckpointFile(path, f"{self.url}/{name}")
            except (CheckpointError, OSError):
                path.unlink(missing_ok=True)
                raise
        self._whole.add(name)
        return checkpoint

    def export(self) -> ExportedConnector | None:
        """Open the export that lies here in place of checkpoints; None where there is none.

        Of a bucket no more is downloaded than the files that hold the connector.

        Raises:
            CheckpointError: It is damaged.
            StoreError: It cannot be read.
        """
        names = ride_out(self._store.names, f"list {self.url}", self.store_timeout)
        if FACTS_FILE not in names:
            return None
        if isinstance(self._store, FolderStore):
            return ExportedConnector(self._store.folder, self.url)
        with TemporaryDirectory(prefix=".export-", dir=self.scratch) as temporary:
            folder = Path(temporary)
            for small in {FACTS_FILE, INDEX_FILE} & {*names}:
                self._get(small, folder / small)
            for weights in connector_files(folder, self.url):
                self._get(weights, folder / weights)
            return ExportedConnector(folder, self.url)

    def done_with(self, checkpoint: CheckpointFile) -> None:
        """Delete the local copy of a checkpoint that was downloaded."""
        if not isinstance(self._store, FolderStore):
            checkpoint.path.unlink(missing_ok=True)

    def _point_at(self, name: str) -> None:
        pointer = partial_path(self.scratch / LATEST)
        with best_effort(f"write {self.url}/{LATEST}"):
            try:
                pointer.write_text(name + "\n")
                self._put(pointer, LATEST)
            finally:
                pointer.unlink(missing_ok=True)

    def _get(self, name: str, path: Path) -> None:
        log.info("Downloading %s from %s.", name, self.url)
        what = f"download {self.url}/{name}"
        ride_out(lambda: self._store.get(name, path), what, self.store_timeout)

    def _put(self, path: Path, name: str) -> None:
        what = f"save {self.url}/{name}"
        if isinstance(self._store, FolderStore):
            ride_out(lambda: move_durably(path, self.scratch / name), what, 0)
            return
        ride_out(lambda: self._store.put(path, name), what, self.store_timeout)
        path.unlink()

    def _delete(self, name: str) -> None:
        what = f"delete {self.url}/{name}"
        ride_out(lambda: self._store.delete(name), what, self.store_timeout)


def _age(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    assert match is not None
    epoch, batch = map(int, match.groups())
    return batch, epoch


def _is_ours(name: str) -> bool:
    return name == LATEST or _NAME.fullmatch(name) is not None


def open_named(
    load_path: str, scratch: Path, store_timeout: float = 0
) -> tuple[CheckpointFolder, CheckpointFile]:
    """Open what `load_path` names: a checkpoint, the newest in a folder or a bucket's prefix, or
    what `python -m vlm_composer.export` wrote, in a folder or a bucket.

    Args:
        load_path: As above.
        scratch: A local folder for what is downloaded.
        store_timeout: Seconds that a bucket may be unavailable.

    Raises:
        CheckpointError: There is no checkpoint of this project.
        StoreError: It cannot be read.
    """
    if "://" not in load_path and not Path(load_path).exists():
        raise FileNotFoundError(f"load_path: there is nothing at {load_path}")
    if load_path.endswith(SUFFIX) or Path(load_path).is_file():
        parent, _, name = load_path.rpartition("/")
        folder = CheckpointFolder(parent or ".", scratch, store_timeout=store_timeout)
        return folder, folder.fetch(name)
    folder = CheckpointFolder(load_path, scratch, store_timeout=store_timeout)
    found = folder.export() or folder.newest()
    if found is None:
        raise CheckpointError(
            f"load_path: {load_path} holds no checkpoint (ep0-ba100{SUFFIX}) and no export"
        )
    return folder, found
