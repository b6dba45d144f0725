"""Captions of the same held-out images at every evaluation, to look at."""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.core import State
from composer.loggers import Logger, WandBLogger
from composer.utils import dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vlm_composer.data.by_index import CaptionsByIndex
from vlm_composer.data.encoder import BatchEncoder
from vlm_composer.evaluation.at_evaluation import AtEvaluation, evenly_chosen, my_share
from vlm_composer.evaluation.captioning import caption_images
from vlm_composer.images.pil import open_image, to_rgb
from vlm_composer.models.composer_model import ComposerVLM
from vlm_composer.outages import best_effort
from vlm_composer.ranks import on_every_rank, on_rank_zero

log = logging.getLogger(__name__)

PICTURE_SIZE = 384
"""Longest side of the pictures beside the captions, in pixels."""
_NAME_BYTES = 200
"""Of a file's name, without what tells it from others; file systems take 255."""


class HeldOut(NamedTuple):
    """A sample of the evaluation set that is captioned."""

    name: str
    prompt: str
    answer: str
    image: Tensor
    """As the model takes it."""
    file: bytes | None
    """The image's own file; None where the data hold patches in its place."""


class CaptionLog(AtEvaluation):
    """Caption a few images of the evaluation set, greedily, at each evaluation.

    They are chosen evenly over the set, so that they are always the same, and each has its sample's
    own prompt. The ranks share them. Rank 0 writes, below the folder:

    - `ba{N}.jsonl` for the evaluation after batch N, a line an image:
      `{"id": …, "image": "images/ID.jpg", "truth": …, "caption": …}`; "image" is null where the
      data hold patches in place of images.
    - `images/ID.jpg`: the images, upright and in their own shape.

    With W&B, a table `captions` with the pictures. What it took is `captions/seconds`.

    Args:
        data: The evaluation set.
        encoder: What makes batches of it.
        folder: Where the files go.
        batch_size: Images a rank captions at a time.
        num_images: Images to caption; all where there are fewer.
        max_new_tokens: Longest caption in tokens.
    """

    def __init__(
        self,
        data: CaptionsByIndex,
        encoder: BatchEncoder,
        folder: str | Path,
        *,
        batch_size: int,
        num_images: int,
        max_new_tokens: int,
    ) -> None:
        self._data = data
        self._encoder = encoder
        self._folder = Path(folder)
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._indices = evenly_chosen(num_images, len(data))
        self._share = my_share(len(self._indices))
        self._samples: list[HeldOut] = []
        self._pictures: list[str | None] = []

    def look(self, state: State, logger: Logger, model: ComposerVLM) -> None:
        """Caption the images and write what comes out."""
        start = time.perf_counter()
        if not self._samples:
            self._samples = on_every_rank(self._read)
            self._pictures = on_rank_zero(self._write_pictures)
        captions = self._captions(state, model)
        if dist.get_global_rank() == 0:
            with best_effort(f"write captions to {self._folder}"):
                self._write(captions, logger, state.timestamp.batch.value)
        logger.log_metrics({"captions/seconds": time.perf_counter() - start})

    def _read(self) -> list[HeldOut]:
        samples = []
        for index in self._indices:
            record = self._data[index]
            text = (record["id"], record["prompt"], record["answer"])
            samples.append(HeldOut(*text, self._encoder.image(record), record.get("image")))
        return samples

    def _captions(self, state: State, model: ComposerVLM) -> list[str]:
        """Caption this rank's share, and gather everybody's."""
        in_step = any(isinstance(module, FSDPModule) for module in model.modules())
        captions: dict[int, str] = {}
        for start in range(0, len(self._share), self._batch_size):
            batch = self._share[start : start + self._batch_size]
            samples = [self._samples[place] for place, _ in batch]
            images = state.device.tensor_to_device(torch.stack([s.image for s in samples]))
            texts = caption_images(
                model.model,
                self._encoder.template,
                images,
                [s.prompt for s in samples],
                max_new_tokens=self._max_new_tokens,
                in_step=in_step and dist.get_world_size() > 1,
            )
            captions |= {
                place: text for (place, counts), text in zip(batch, texts, strict=True) if counts
            }
        for other in dist.all_gather_object(captions):
            captions |= other
        return [captions[place] for place in range(len(self._samples))]

    def _write_pictures(self) -> list[str | None]:
        """Write the images once; return their paths below the folder."""
        names = picture_names([sample.name for sample in self._samples])
        paths: list[str | None] = [None] * len(names)
        with best_effort(f"write pictures to {self._folder}"):
            (self._folder / "images").mkdir(parents=True, exist_ok=True)
            for place, (name, sample) in enumerate(zip(names, self._samples, strict=True)):
                if sample.file:
                    with open_image(sample.file) as image:
                        picture = to_rgb(image)
                    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
                    picture.save(self._folder / "images" / name, quality=90)
                    paths[place] = f"images/{name}"
        return paths

    def _write(self, captions: Sequence[str], logger: Logger, batch: int) -> None:
        """Write a file and a W&B table."""
        lines = [
            {"id": sample.name, "image": picture, "truth": sample.answer, "caption": caption}
            for sample, picture, caption in zip(
                self._samples, self._pictures, captions, strict=True
            )
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (self._folder / f"ba{batch}.jsonl").write_text(text, encoding="utf-8")
        log.info(
            "Captions: %s",
            "; ".join(f"{line['truth']!r} → {line['caption']!r}" for line in lines[:3]),
        )
        for destination in logger.destinations:
            if isinstance(destination, WandBLogger):
                rows = [[x["id"], self._wandb_image(x["image"]), *_texts(x)] for x in lines]
                columns = ["id", "image", "truth", "caption"]
                destination.log_table(columns, rows, name="captions", step=batch)

    def _wandb_image(self, picture: str | None) -> Any:
        import wandb  # slow to import, and needed here alone

        return None if picture is None else wandb.Image(str(self._folder / picture))


def _texts(line: dict[str, str | None]) -> list[str | None]:
    return [line["truth"], line["caption"]]


def picture_names(ids: Sequence[str]) -> list[str]:
    """Return file names for samples, whose ids may hold anything and need not differ.

    They differ on file systems that ignore case and compare normalised names, too.
    """
    names: dict[str, str] = {}
    for place, name in enumerate(ids):
        plain = re.sub(r"[^\w.-]", "_", name)[:100].encode()[:_NAME_BYTES].decode(errors="ignore")
        plain = plain.strip(".") or "_"
        different = (f"{plain}-{number}.jpg" for number in itertools.count(place))
        for found in itertools.chain([f"{plain}.jpg"], different):
            compared = unicodedata.normalize("NFC", found).casefold()
            if compared not in names:
                names[compared] = found
                break
    return list(names.values())
