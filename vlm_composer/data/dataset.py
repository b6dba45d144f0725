"""Samples out of MDS shards, as the model reads them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from torch.utils.data import Dataset

import vlm_composer.data.shared_names  # noqa: F401  (replaces a part of streaming)
from vlm_composer.config.data import ImageDecoder
from vlm_composer.data.cache_room import bytes_to_fetch
from vlm_composer.data.features import FEATURES_FILE, Features
from vlm_composer.data.images import decode_image
from vlm_composer.data.schema import IMAGE_KEYS
from vlm_composer.data.stream import CheckedStream
from vlm_composer.data.template import Template
from vlm_composer.outages import StoreError

Encoder = Callable[[dict[str, Any]], dict[str, Any]]
"""Turns a record into what a batch is made of."""


class SampleEncoder:
    """Turns one MDS record into tensors.

    Args:
        template: Makes ids and labels of prompt and answer.
        image_size: Side S of the vision tower's images in pixels.
        resample: PIL's filter for scaling to it.
        image_decoder: Who decodes and scales, see `decode_image`.
    """

    def __init__(
        self,
        template: Template,
        *,
        image_size: int,
        resample: int = Image.Resampling.BICUBIC,
        image_decoder: ImageDecoder = "torchvision",
    ) -> None:
        self.template = template
        self.image_size = image_size
        self.resample = resample
        self.image_decoder = image_decoder
        self.features: Features | None = None

    def reading(self, features: Features | None) -> SampleEncoder:
        """Return one like this for records that hold patches in place of images."""
        encoder = copy.copy(self)
        encoder.features = features
        return encoder

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        r"""Encode a record.

        Args:
            record: As in `vlm_composer.data.schema`, for example
                `{"id": "7", "image": b"\x89PNG…", "prompt": "<image>\nWhat?", "answer": "A cat."}`.

        Returns:
            `{"id": "7", "pixel_values": uint8 (3, S, S), "input_ids": (T,), "labels": (T,),
            "num_cut": 0}`. A record with `patches` gives `patches` (N, V) in place of the pixels.

        Raises:
            ValueError: The record cannot be encoded; the message names it.
        """
        try:
            text = self.template.encode(record["prompt"], record["answer"])
            image = self._image(record)
        except ValueError as error:
            raise ValueError(f"sample {record['id']}: {error}") from error
        return {
            "id": record["id"],
            **image,
            "input_ids": torch.tensor(text.input_ids),
            "labels": torch.tensor(text.labels),
            "num_cut": text.num_cut,
        }

    def _image(self, record: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.features is not None:
            return {"patches": self.features.decode(record["patches"])}
        pixels = decode_image(record["image"], self.image_size, self.resample, self.image_decoder)
        return {"pixel_values": pixels}


class StreamingCaptions(StreamingDataset):
    """A StreamingDataset of encoded samples that fails loudly.

    When a shard cannot be read, streaming 0.13 logs the error of its background thread, ends the
    epoch as if it were complete, and leaves other workers waiting for the shard for ever.

    Args:
        encoder: Turns a record into tensors.
        stream: Where the shards are.
        streaming: Keyword arguments of `streaming.StreamingDataset`.
    """

    def __init__(self, encoder: Encoder, stream: CheckedStream, **streaming: Any) -> None:
        super().__init__(streams=[stream], **streaming)
        self.encoder = encoder
        self._failure: BaseException | None = None
        self.features: Features | None = None
        """What the patches are, where the records hold patches in place of images."""
        if "patches" in self.columns:
            self.features = Features.read(stream.fetch_beside(FEATURES_FILE))

    @property
    def columns(self) -> list[str]:
        """Names of a record's fields."""
        shard: Any = self.shards[0]
        return list(shard.column_names)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from another: its samples and a hash of its index."""
        (stream,) = self.streams
        index = Path(stream.local, stream.split, "index.json").read_bytes()
        return {"samples": self.num_samples, "index_xxh64": xxhash.xxh64_hexdigest(index)}

    def check_disk(self) -> None:
        """Raise StoreError where the disk has no room for the shards that are not there yet."""
        (stream,) = self.streams
        folder = Path(stream.local, stream.split)
        files = {raw.basename: raw.bytes for shard in self.shards for raw, _ in shard.file_pairs}
        limit = int(self.cache_limit) if self.cache_limit else None  # a number by now
        missing, free = bytes_to_fetch(folder, files, limit), shutil.disk_usage(folder).free
        if free < missing:
            raise StoreError(
                f"{folder}: the cache needs {missing / 1e9:.1f} GB more and the disk has "
                f"{free / 1e9:.1f} GB free; free some, or set dataset.cache_limit"
            )

    def resample_streams(
        self, epoch: int, stream_id: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Let features be shuffled as their images would be: by the images' shards."""
        units, sample_ids = super().resample_streams(epoch, stream_id)
        if self.features is not None:
            units = np.array(self.features.shuffle_units, np.int64)
        return units, sample_ids

    def __getitem__(self, at: Any) -> Any:
        """Return the encoded sample `at`."""
        return self.encoder(super().__getitem__(at))

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
        return super().get_item(sample_id, retry)

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
        evicted before it looked. This one fetches it, which fails here as well.
        """
        assert self.predownload is not None  # streaming chose one
        try:
            while it.ready_index < it.total and not (it.should_exit() or self._event.is_set()):
                sample_id = it.sample_ids[it.ready_index]
                if it.ready_index - it.yield_index > self.predownload:
                    sleep(TICK)
                elif sample_id == -1 or self._is_local(shard := self.spanner[sample_id][0]):
                    it.ready_index += 1
                elif (
                    it.prepare_index > it.ready_index  # the other thread is past it
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


class CaptionsByIndex(Dataset[dict[str, Any]]):
    """Random access to the samples of a StreamingDataset, for evaluation.

    A StreamingDataset iterated over several ranks repeats samples until they divide, which biases a
    metric. Read by index, a DistributedSampler splits the samples and Composer drops what it
    padded, so that every sample counts once.

    Args:
        captions: The samples.
        image_shift: Sample i gets the image of sample i + `image_shift` (around the end). With 0
            each has its own; with another value a model that looks at the image must do worse.

    Raises:
        ValueError: The shift would give every sample its own image again.
    """

    def __init__(self, captions: StreamingCaptions, image_shift: int = 0) -> None:
        if image_shift and image_shift % captions.num_samples == 0:
            raise ValueError(
                f"image_shift {image_shift} with {captions.num_samples} sample(s) gives each its "
                "own image"
            )
        self.captions = captions
        self.image_shift = image_shift

    @property
    def features(self) -> Features | None:
        """Those of the samples."""
        return self.captions.features

    @property
    def template(self) -> Template:
        """What made token ids of the samples."""
        assert isinstance(self.captions.encoder, SampleEncoder)
        return self.captions.encoder.template

    def __len__(self) -> int:
        return self.captions.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.captions[index]
        if self.image_shift:
            other = self.captions[(index + self.image_shift) % len(self)]
            sample |= {key: other[key] for key in IMAGE_KEYS if key in other}
        return sample
