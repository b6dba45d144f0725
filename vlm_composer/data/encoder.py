"""Records to batches, as the model reads them: a loader's `collate_fn`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_composer.config.data import ImageDecoder
from vlm_composer.data.batch_memory import BatchMemory
from vlm_composer.data.features import Features
from vlm_composer.data.images import decode_image
from vlm_composer.data.template import Template, TokenizedSample

ImagesOf = Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
"""Makes of B records what a batch holds of their images, by its key."""


class SampleError(ValueError):
    """A sample cannot be made part of a batch. The message names it and says what to do."""


class Pixels:
    """Decodes the images of records.

    Args:
        image_size: Side S of the vision tower's images in pixels.
        resample: PIL's filter for scaling to it.
        image_decoder: Who decodes and scales, see `decode_image`.
    """

    def __init__(self, image_size: int, resample: int, image_decoder: ImageDecoder) -> None:
        self.image_size = image_size
        self.resample = resample
        self.image_decoder = image_decoder
        self._memory = BatchMemory()

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `pixel_values` uint8 (B, 3, S, S).

        Raises:
            SampleError: An image cannot be read.
        """

        def decode(pixels: Tensor) -> None:
            for image, record in zip(pixels, records, strict=True):
                try:
                    decode_image(
                        record["image"], self.image_size, self.resample, self.image_decoder, image
                    )
                except ValueError as error:
                    raise SampleError(f"sample {record['id']}: {error}") from error

        shape = len(records), 3, self.image_size, self.image_size
        return {"pixel_values": self._memory.batch(shape, torch.uint8, decode)}


class Patches:
    """Reads what the vision tower made of the images of records.

    Args:
        features: What the records hold.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self._memory = BatchMemory()

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `patches` (B, N, V).

        Raises:
            SampleError: Patches are not of the size that `features.json` says.
        """

        def read(patches: Tensor) -> None:
            for image, record in zip(patches, records, strict=True):
                try:
                    self.features.decode(record["patches"], image)
                except ValueError as error:
                    raise SampleError(f"sample {record['id']}: {error}") from error

        shape = len(records), self.features.num_patches, self.features.hidden_size
        return {"patches": self._memory.batch(shape, self.features.torch_dtype, read)}


class BatchEncoder:
    """Makes a batch of records.

    Tokens are few and what packs them is arithmetic: they stay on the host, as arrays, which
    Composer leaves where they are. Only the images go to the device with the batch.

    Args:
        template: Makes ids and labels of prompt and answer.
        images: Makes the images' part.
    """

    def __init__(self, template: Template, images: ImagesOf) -> None:
        self.template = template
        self.images = images

    def reading(self, features: Features | None) -> BatchEncoder:
        """Return one like this for records that hold patches in place of images, if they do."""
        return self if features is None else BatchEncoder(self.template, Patches(features))

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        r"""Encode B records.

        Args:
            records: As in `vlm_composer.data.schema`, for example
                `{"id": "7", "image": b"\x89PNG…", "prompt": "<image>\nWhat?", "answer": "A cat."}`,
                in order.

        Returns:
            `ids` (B names), `pixel_values` uint8 (B, 3, S, S) or `patches` (B, N, V), `input_ids`
            and `labels` (B int64 arrays (T_i,) each), `num_cut` (B numbers of answer tokens that
            were cut).

        Raises:
            SampleError: A record cannot be encoded.
        """
        texts = self.texts(records)
        return {
            "ids": [record["id"] for record in records],
            **self.images(records),
            "input_ids": [np.array(text.input_ids) for text in texts],
            "labels": [np.array(text.labels) for text in texts],
            "num_cut": [text.num_cut for text in texts],
        }

    def image(self, record: dict[str, Any]) -> Tensor:
        """Make of one record what a batch holds of its images: pixels (3, S, S) or patches (N, V).

        Raises:
            SampleError: The image cannot be read.
        """
        (images,) = self.images([record]).values()
        return images[0]

    def texts(self, records: Sequence[dict[str, Any]]) -> list[TokenizedSample]:
        """Tokenize the texts of records.

        Raises:
            SampleError: One leaves no room for an answer.
        """
        texts = []
        answers = self.template.tokenize([record["answer"] for record in records])
        for record, answer in zip(records, answers, strict=True):
            try:
                texts.append(self.template.join(record["prompt"], answer))
            except ValueError as error:
                raise SampleError(f"sample {record['id']}: {error}") from error
        return texts
