"""Samples out of MDS shards, as the model reads them."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from streaming import StreamingDataset
from torch.utils.data import Dataset

from vlm_composer.data.images import decode_image
from vlm_composer.data.template import Template


class SampleEncoder:
    """Turns one MDS record into tensors.

    Args:
        template: Makes ids and labels of prompt and answer.
        image_size: Side S of the vision tower's images in pixels.
        resample: PIL's filter for scaling to it.
    """

    def __init__(
        self, template: Template, *, image_size: int, resample: int = Image.Resampling.BICUBIC
    ) -> None:
        self.template = template
        self.image_size = image_size
        self.resample = resample

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        r"""Encode a record.

        Args:
            record: As in `vlm_composer.data.schema`, for example
                `{"id": "7", "image": b"\x89PNG…", "prompt": "<image>\nWhat?", "answer": "A cat."}`.

        Returns:
            `{"id": "7", "pixel_values": uint8 (3, S, S), "input_ids": (T,), "labels": (T,),
            "num_cut": 0}`.

        Raises:
            ValueError: The record cannot be encoded; the message names it.
        """
        try:
            text = self.template.encode(record["prompt"], record["answer"])
            pixels = decode_image(record["image"], self.image_size, self.resample)
        except ValueError as error:
            raise ValueError(f"sample {record['id']}: {error}") from error
        return {
            "id": record["id"],
            "pixel_values": pixels,
            "input_ids": torch.tensor(text.input_ids),
            "labels": torch.tensor(text.labels),
            "num_cut": text.num_cut,
        }


class StreamingCaptions(StreamingDataset):
    """A StreamingDataset of encoded samples, for training.

    Args:
        encoder: Turns a record into tensors.
        streaming: Keyword arguments of `streaming.StreamingDataset`.
    """

    def __init__(self, encoder: SampleEncoder, **streaming: Any) -> None:
        super().__init__(**streaming)
        self.encoder = encoder

    def __getitem__(self, at: Any) -> Any:
        """Return the encoded sample `at`."""
        return self.encoder(super().__getitem__(at))


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

    def __len__(self) -> int:
        return self.captions.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.captions[index]
        if self.image_shift:
            other = self.captions[(index + self.image_shift) % len(self)]
            sample["pixel_values"] = other["pixel_values"]
        return sample
