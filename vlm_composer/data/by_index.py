"""Records in any order, for evaluation."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from vlm_composer.data.dataset import StreamingCaptions
from vlm_composer.data.features import Features
from vlm_composer.data.schema import IMAGE_COLUMNS


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
    def features(self) -> dict[str, Features]:
        """Those of the samples."""
        return self.captions.features

    def __len__(self) -> int:
        return self.captions.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: dict[str, Any] = self.captions[index]
        if self.image_shift:
            other = self.captions[(index + self.image_shift) % len(self)]
            record |= {key: other[key] for key in IMAGE_COLUMNS if key in other}
        return record
