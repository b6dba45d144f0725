"""Shards that are what the index says they are, from a store that may go away.

A stock streaming 0.13 `Stream` gives up after a few attempts, checks no shard that is already in
the local cache, and keeps a shard that failed its check, so that the next attempt reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.hashing import get_hash
from streaming.base.world import World

from vlm_composer.local_files import move_durably, partial_path
from vlm_composer.mds.compression import decompress
from vlm_composer.mds.index import (
    INDEX_FILE,
    Compression,
    DamagedIndexError,
    Index,
    IndexFaultError,
    parse_index,
    read_index,
)
from vlm_composer.mds.json_object import MAX_JSON_BYTES, parse_object
from vlm_composer.mds.reader import readers
from vlm_composer.outages import StoreError, TooLargeError, ride_out
from vlm_composer.ranks import run_on
from vlm_composer.storage import Store, open_store


class CorruptShardError(OSError):
    """A shard is not what its index says, and fetching it again did not help."""


class CheckedStream(Stream):
    """A `Stream` whose every shard is checked before it is read, wherever it comes from.

    A shard gets its final name only once it is whole and right, so that a killed run leaves nothing
    that the next one could take for data. A shard that is found in the cache is checked when it is
    first used.

    Args:
        name: What messages and checkpoints call it.
        store_timeout: Seconds that the store may be away before reading fails.
        check_at_start: Check the whole cache when the data set is opened instead of each shard when
            it is first used. Needed with a `cache_limit`, which must know what the cache holds.
        stream: Keyword arguments of `streaming.Stream`.
    """

    def __init__(
        self,
        *,
        name: str = "dataset",
        store_timeout: float,
        check_at_start: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(**stream)
        self.name = name
        given = {key: stream.get(key) for key in ("proportion", "repeat", "choose")}
        self.weight = {key: value for key, value in given.items() if value is not None}
        self.store_timeout = store_timeout
        self.check_at_start = check_at_start
        self._store: Store | None = None
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the connections behind."""
        return self.__dict__ | {"_store": None}

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Read and check the index, downloaded again when a run starts: shards are checked by it.

        Raises:
            IndexFaultError: The index cannot be used.
            StoreError: The store cannot be reached, or holds no index.
            CorruptShardError: What it holds is not an index.
        """
        del allow_unsafe_types  # none is read
        if self.remote:
            run_on(
                world.is_local_leader,
                lambda: self._fetch(INDEX_FILE, MAX_JSON_BYTES, _index_fault, "the index"),
            )
        place = f"{self.remote or self.local}/{INDEX_FILE}"
        self.index: Index = read_index(self._path(INDEX_FILE), place)
        shards: list[Reader] = []
        shards += readers(self.index, self.local, self.split)
        return shards

    def fetch_beside(self, basename: str) -> Path:
        """Return the path of a JSON file beside the index; all ranks must call this.

        As the index, it is downloaded again where there is a remote.

        Raises:
            StoreError: It cannot be fetched.
        """
        if self.remote:
            leads = World.detect().is_local_leader
            run_on(leads, lambda: self._fetch(basename, MAX_JSON_BYTES, _json_fault, basename))
        return self._path(basename)

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Say that no shard is there: one that is will be checked by `prepare_shard`."""
        cache_usage_per_shard[:] = 0
        if self.check_at_start:
            for index, shard in enumerate(shards):
                if all(self._path(info.basename).is_file() for info, _ in shard.file_pairs):
                    cache_usage_per_shard[index] = self.prepare_shard(shard)

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        """Make sure that a file of a shard is in the local folder and right.

        Returns:
            The bytes that it takes there.

        Raises:
            CorruptShardError: It is not, and fetching it again did not help.
            StoreError: It cannot be fetched.
        """
        raw = self._path(raw_info.basename)
        if raw.is_file():
            fault = self._fault(raw, raw_info)
            if fault is None:
                return raw_info.bytes
            if not self.remote:
                raise CorruptShardError(f"{raw} is corrupt: {fault}; convert the data set again")
            raw.unlink(missing_ok=True)
        if not self.remote:
            raise StoreError(f"{raw} is missing, and there is no remote to fetch it from")
        if zip_info is None:
            self._fetch_file(raw_info)
            return raw_info.bytes
        self._fetch_file(zip_info)
        zipped = self._path(zip_info.basename)
        self._unpack(zipped, raw_info, cast(Compression, compression))
        if self.safe_keep_zip:
            return raw_info.bytes + zip_info.bytes
        zipped.unlink()
        return raw_info.bytes

    def _unpack(self, zipped: Path, raw_info: FileInfo, compression: Compression) -> None:
        """Unpack a shard, check it, and name it."""
        target = self._path(raw_info.basename)
        partial = partial_path(target)
        try:
            fault = decompress(zipped, partial, compression, raw_info.bytes)
            if fault := fault or self._fault(partial, raw_info):
                zipped.unlink()
                raise CorruptShardError(
                    f"{zipped.name} of {self.remote} is corrupt: {fault}. Upload it again"
                )
            move_durably(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _fetch_file(self, info: FileInfo) -> None:
        self._fetch(info.basename, info.bytes, lambda path: self._fault(path, info), info.basename)

    def _fetch(
        self, basename: str, limit: int, fault_of: Callable[[Path], str | None], what: str
    ) -> None:
        """Download a file of at most `limit` bytes, check it, download it once more where it is
        wrong, and name it."""
        assert self.remote is not None
        target = self._path(basename)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(target)
        name = os.path.join(self.split or "", basename)
        fault = None
        for _ in range(2):
            try:
                ride_out(
                    lambda: self._open().get(name, partial, limit),
                    f"download {self.remote}/{name}",
                    self.store_timeout,
                )
                fault = fault_of(partial)
                if fault is None:
                    move_durably(partial, target)
                    return
            except TooLargeError as error:
                fault = str(error)
            finally:
                partial.unlink(missing_ok=True)
        raise CorruptShardError(
            f"{what} of {self.remote} is corrupt: {fault}; it was downloaded twice. Upload it again"
        )

    def _fault(self, path: Path, info: FileInfo) -> str | None:
        """Say what is wrong with a local file; None where it is what the index says.

        Raises:
            ValueError: The index has no hash of the kind that is asked for.
        """
        size = path.stat().st_size
        if size != info.bytes:
            return f"it has {size} bytes, the index says {info.bytes}"
        if not self.validate_hash:
            return None
        if self.validate_hash not in info.hashes:
            raise ValueError(
                f"validate_hash: {self.validate_hash}, but the index of {self.remote or self.local}"
                f" has {', '.join(sorted(info.hashes)) or 'no hashes'}; set one of those, or null "
                "to check sizes only"
            )
        found, expected = (
            get_hash(self.validate_hash, path.read_bytes()),
            info.hashes[self.validate_hash],
        )
        if found != expected:
            return f"its {self.validate_hash} is {found}, the index says {expected}"
        return None

    def _path(self, basename: str) -> Path:
        return Path(self.local) / (self.split or "") / basename

    def _open(self) -> Store:
        """This process's connection to the store: a loader's worker must not share its parent's."""
        if self._store is None or self._owner != os.getpid():
            assert self.remote is not None
            self._store, self._owner = open_store(self.remote), os.getpid()
        return self._store


def _json_fault(path: Path) -> str | None:
    try:
        parse_object(path.read_bytes())
    except ValueError as error:
        return str(error)
    return None


def _index_fault(path: Path) -> str | None:
    """Say how an index was damaged. One that cannot be used is not fetched again: every rank that
    reads it refuses it."""
    try:
        parse_index(path.read_bytes())
    except DamagedIndexError as error:
        return str(error)
    except IndexFaultError:
        return None
    return None
