"""Records out of MDS shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState

import vlm_composer.data.shared_names  # noqa: F401  (replaces a part of streaming)
from vlm_composer.data.cache_room import disk_needs
from vlm_composer.data.features import Features, check_alike
from vlm_composer.data.mixing import Mix, Part
from vlm_composer.data.stream import CheckedStream
from vlm_composer.mds.index import FEATURES_FILE, INDEX_FILE
from vlm_composer.outages import StoreError


class StreamingCaptions(StreamingDataset):
    """A StreamingDataset of records that fails loudly.

    When a shard cannot be read, streaming 0.13 logs the error of its background thread, ends the
    epoch as if it were complete, and leaves other workers waiting for the shard for ever.

    Args:
        streams: Where the shards are, and how much of them an epoch takes.
        streaming: Keyword arguments of `streaming.StreamingDataset`.

    Raises:
        FeaturesError: Some hold images and others features, or features of another kind.
    """

    def __init__(self, streams: Sequence[CheckedStream], **streaming: Any) -> None:
        super().__init__(streams=streams, **streaming)
        self._failure: BaseException | None = None
        self.features = self._read_features()
        """What the patches of each stream are, by its name; empty where the records hold images."""

    def _read_features(self) -> dict[str, Features]:
        found: dict[str, Features | None] = {}
        for stream, _ in self._parts():
            found[stream.name] = None
            if "patches" in stream.index.columns:
                features = Features.read(stream.fetch_beside(FEATURES_FILE))
                features.check_index(stream.index, stream.name)
                found[stream.name] = features
        check_alike(found)
        return {name: features for name, features in found.items() if features is not None}

    def _parts(self) -> Iterator[tuple[CheckedStream, list[Any]]]:
        """Each stream and its shards."""
        for stream, start, count in zip(
            self.streams, self.shard_offset_per_stream, self.shards_per_stream, strict=True
        ):
            assert isinstance(stream, CheckedStream)
            yield stream, self.shards[start : start + count]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others: of each stream its samples, a hash of its index and
        its weight, and the size of an epoch where it is not that of all samples. One stream alone
        needs no name."""
        found: dict[str, Any] = {}
        for stream, shards in self._parts():
            index = Path(stream.local, stream.split, INDEX_FILE).read_bytes()
            found[stream.name] = {
                "samples": sum(map(len, shards)),
                "index_xxh64": xxhash.xxh64_hexdigest(index),
                **stream.weight,
            }
        if len(found) == 1:
            (found,) = found.values()
        if self.epoch_size != self.num_samples:
            found["epoch_size"] = self.epoch_size
        return found

    @property
    def mix(self) -> Mix:
        """What an epoch takes of each stream."""
        return {
            stream.name: Part(int(stream.choose), sum(map(len, shards)))
            for stream, shards in self._parts()
        }

    def check_disk(self) -> None:
        """Raise StoreError where a disk has no room for the shards that are not there yet."""
        caches = {
            Path(stream.local, stream.split): {
                raw.basename: raw.bytes for shard in shards for raw, _ in shard.file_pairs
            }
            for stream, shards in self._parts()
            if stream.remote
        }
        limit = int(self.cache_limit) if self.cache_limit else None  # a number by now
        for need in disk_needs(caches, limit):
            free = shutil.disk_usage(need.folders[0]).free
            if free < need.missing:
                raise StoreError(
                    f"{', '.join(map(str, need.folders))}: the cache needs "
                    f"{need.missing / 1e9:.1f} GB more and the disk has {free / 1e9:.1f} GB free; "
                    "free some, or set dataset.cache_limit"
                )

    def resample_streams(
        self, epoch: int, stream_id: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw and shuffle features as their images would be: by the images' shards."""
        if not self.features:
            return super().resample_streams(epoch, stream_id)
        units = [features.shuffle_units for features in self.features.values()]
        counts = np.array([len(sizes) for sizes in units], np.int64)
        samples = np.concatenate(units).astype(np.int64)
        as_images: Any = SimpleNamespace(
            **self.__dict__
            | {
                "shards_per_stream": counts,
                "shard_offset_per_stream": counts.cumsum() - counts,
                "samples_per_shard": samples,
                "sample_offset_per_shard": samples.cumsum() - samples,
            }
        )
        return StreamingDataset.resample_streams(as_images, epoch, stream_id)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over this worker's part of an epoch.

        Raises:
            StoreError: A shard cannot be fetched.
            CorruptShardError: A shard is not what its index says.
        """
        self._failure = None
        yield from super().__iter__()
        if self._failure is not None:
            raise self._failure

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Return a record, once its shard is known to be right."""
        if self._failure is not None:
            raise self._failure
        shard_id, _ = self.spanner[sample_id]
        # Again, where another worker's attempt failed: a shard that is wrong may still be there.
        while not self._is_local(shard_id):
            self.prepare_shard(shard_id)
        try:
            return super().get_item(sample_id, retry)
        except RuntimeError as error:  # the shard was deleted, or evicted again and again
            raise self._failure or StoreError(str(error)) from error

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and check a shard; where that fails, let other workers see it fail as well.

        streaming asks for the shard of every sample, and takes a lock on a file each time. Without
        a `cache_limit` a shard that is there stays there.
        """
        if self.cache_limit is None and self._is_local(shard_id):
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            self._shard_states[shard_id] = _ShardState.REMOTE
            raise

    def _prepare_thread(self, it: _Iterator) -> None:
        """Fetch ahead. A thread that fails has ended too: streaming waits for those that end."""
        try:
            super()._prepare_thread(it)
        except Exception:
            it.on_exit()
            raise

    def _ready_thread(self, it: _Iterator) -> None:
        """Count the samples whose shards are there.

        streaming's own waits for ever for a shard that another worker could not fetch, or that was
        evicted before it looked. This one fetches it, which fails here as well. And without a
        `cache_limit` it counts on, however far, as long as shards are there: once all are, it ends,
        and the thread that fetches with it, where both would look every 7 ms.
        """
        assert self.predownload is not None  # streaming chose one
        try:
            while it.ready_index < it.total and not (it.should_exit() or self._event.is_set()):
                sample_id = it.sample_ids[it.ready_index]
                is_far = it.ready_index - it.yield_index > self.predownload
                is_there = sample_id == -1 or self._is_local(shard := self.spanner[sample_id][0])
                if is_there and (self.cache_limit is None or not is_far):
                    it.ready_index += 1
                elif (
                    not is_far
                    and it.prepare_index > it.ready_index  # the other thread is past it
                    and self._shard_states[shard] == _ShardState.REMOTE
                ):
                    self.prepare_shard(shard, False)
                else:
                    sleep(TICK)
        finally:
            it.on_exit()

    def _is_local(self, shard_id: int) -> bool:
        return bool(self._shard_states[shard_id] == _ShardState.LOCAL)

    def on_exception(self, future: Future[None]) -> None:
        """Keep the error of a background thread for whoever iterates."""
        if (error := future.exception()) is not None:
            self._failure = error
            self._event.set()
