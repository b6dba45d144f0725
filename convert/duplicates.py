"""Which items share an image, or image and text, told by hashes that stay on the disk.

Each partition's hashes are an array of `HASHES`, sorted by image. All that is done with them is
done for one range of image hashes after the other, so that memory does not grow with the number of
items; on the disk an item takes 41 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from convert.split import EVAL, TRAIN
from vlm_composer.data.schema import Record

HASHES = np.dtype(
    [("image", "<u8"), ("image_low", "<u8"), ("text", "<u8"), ("text_low", "<u8"),
     ("index", "<i8"), ("side", "i1")]
)  # fmt: skip
"""Of an item: 128 bits of a hash of its image, and of its prompt and answer; its place among the
items of all sources; and its side, as of `split`."""

EXCEPTIONS = np.dtype([("index", "<i8"), ("original", "<i8"), ("side", "i1")])
"""An item that the split alone does not decide on: dropped, as all of it is in the item `original`,
or put in train, where `original` is `MOVED`. `side` is where the split had it."""

MOVED = -1

_RANGE_ROWS = 1 << 19
"""Items of a range, about: 21 MB."""

_LOW = (1 << 64) - 1


def hash_record(record: Record, index: int, side: int) -> tuple[int, ...]:
    """A row of `HASHES`."""
    image = xxhash.xxh3_128_intdigest(record["image"])
    # The lengths keep apart what is prompt in one item and answer in another.
    prompt, answer = record["prompt"].encode(), record["answer"].encode()
    text = xxhash.xxh3_128_intdigest(b"%d,%b%b" % (len(prompt), prompt, answer))
    return (image >> 64, image & _LOW, text >> 64, text & _LOW, index, side)


def sorted_hashes(rows: Sequence[tuple[int, ...]]) -> npt.NDArray[Any]:
    """Rows of `hash_record`, as an array in the order that this module needs."""
    return _sort(np.array(rows, HASHES))


def find_exceptions(
    parts: Sequence[Path], num_items: int, drop_duplicates: bool
) -> npt.NDArray[Any]:
    """Decide on the items that share an image.

    Of items with the same image and text all but the first are dropped, where that is asked for.
    Where an image is then on both sides, all its items go to train: evaluation is on images that
    training never saw.

    Args:
        parts: The .npy files of the partitions' hashes.
        num_items: Items of all sources.
        drop_duplicates: Whether to drop any.

    Returns:
        An array of `EXCEPTIONS`, sorted by index.
    """
    found = [np.empty(0, EXCEPTIONS)]
    for rows in _ranges(parts, num_items):
        groups = _Groups.of(rows)
        dropped = groups.repeats if drop_duplicates else np.zeros(len(rows), bool)
        in_train = groups.any_in_group(~dropped & (rows["side"] == TRAIN))
        moved = ~dropped & (rows["side"] == EVAL) & in_train
        exceptions = np.empty(np.count_nonzero(dropped | moved), EXCEPTIONS)
        chosen = rows[dropped | moved]
        exceptions["index"], exceptions["side"] = chosen["index"], chosen["side"]
        exceptions["original"] = np.where(dropped, groups.originals, MOVED)[dropped | moved]
        found.append(exceptions)
    exceptions = np.concatenate(found)
    exceptions.sort(order="index")
    return exceptions


@dataclass(frozen=True)
class SharedImage:
    """An image of several items with different texts."""

    items: int
    texts: int
    """Different ones."""
    examples: list[int]
    """Indices of the first items."""


@dataclass(frozen=True)
class Sharing:
    """How items share images and text."""

    exact_duplicates: int
    """Items whose image and text an earlier item has."""

    same_image_other_text: int
    """Items whose image, but not text, an earlier item has."""

    much_shared: int
    """Images with so many different texts that they may stand for other images."""

    most_shared: list[SharedImage]
    """Of these, those with the most texts."""


def count_sharing(
    parts: Sequence[Path], num_items: int, least_texts: int, keep: int = 10
) -> Sharing:
    """Count what is shared.

    Args:
        parts: The .npy files of the partitions' hashes.
        num_items: Items of all sources.
        least_texts: Different texts of an image that is much shared.
        keep: Images that are listed, at most.
    """
    exact = other = much = 0
    listed: list[SharedImage] = []
    for rows in _ranges(parts, num_items):
        groups = _Groups.of(rows)
        exact += int(groups.repeats.sum())
        num_images = int(groups.number[-1]) + 1 if len(rows) else 0
        other += int((~groups.repeats).sum()) - num_images
        texts = np.bincount(groups.number[~groups.repeats], minlength=num_images)
        for image in np.flatnonzero(texts >= least_texts).tolist():
            first, end = np.searchsorted(groups.number, [image, image + 1])
            indices = np.sort(rows["index"][first:end])
            much += 1
            listed.append(SharedImage(len(indices), int(texts[image]), indices[:5].tolist()))
            if len(listed) > 10 * keep:
                listed = _top(listed, keep)
    return Sharing(exact, other, much, _top(listed, keep))


def _top(images: Iterable[SharedImage], keep: int) -> list[SharedImage]:
    return sorted(images, key=lambda image: (-image.texts, image.examples[0]))[:keep]


@dataclass(frozen=True)
class _Groups:
    """Sorted rows, grouped by image."""

    number: npt.NDArray[np.int64]
    """Of each row's image, from 0."""

    repeats: npt.NDArray[np.bool_]
    """Rows whose image and text an earlier item has."""

    originals: npt.NDArray[np.int64]
    """For each row, the index of the first item with its image and text."""

    @classmethod
    def of(cls, rows: npt.NDArray[Any]) -> _Groups:
        new_image = _differs(rows, "image", "image_low")
        new_text = new_image | _differs(rows, "text", "text_low")
        first = np.maximum.accumulate(np.where(new_text, np.arange(len(rows)), 0))
        return cls(np.cumsum(new_image) - 1, ~new_text, rows["index"][first])

    def any_in_group(self, rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """For each row, whether any row of its image is one of `rows`."""
        return np.bincount(self.number, weights=rows)[self.number] > 0


def _differs(rows: npt.NDArray[Any], *fields: str) -> npt.NDArray[np.bool_]:
    """Whether a row differs in some fields from the one before."""
    differs = np.zeros(len(rows), bool)
    differs[:1] = True
    for field in fields:
        differs[1:] |= rows[field][1:] != rows[field][:-1]
    return differs


def _ranges(parts: Sequence[Path], num_items: int) -> Iterator[npt.NDArray[Any]]:
    """Rows of all parts, sorted, in ranges of the image's hash."""
    count = -(-num_items // _RANGE_ROWS)
    bounds = [place * (1 << 64) // count for place in range(1, count)]
    starts = np.zeros(len(parts), np.int64)
    for bound in [*bounds, None]:
        rows = [np.empty(0, HASHES)]
        for place, path in enumerate(parts):
            part = np.load(path, mmap_mode="r", allow_pickle=False)
            end = len(part) if bound is None else np.searchsorted(part["image"], np.uint64(bound))
            rows.append(np.array(part[starts[place] : end]))
            starts[place] = end
        yield _sort(np.concatenate(rows))


def _sort(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    keys = [rows[name] for name in ("index", "text_low", "text", "image_low", "image")]
    return rows[np.lexsort(keys)]
