"""The whole conversion, from sources of pairs to MDS shards: the order in which it is done."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from convert.claim import begin, data_set_names
from convert.destination import open_destination
from convert.engine import Engine, LocalEngine
from convert.errors import ConversionError, NoDataSet
from convert.merge import merge
from convert.partition import PARTITIONING, Partitions
from convert.passes import compare_images, write_shards
from convert.sources import LlavaJson, Source
from convert.sources.source import NAMING, is_source_name
from convert.split import Split
from convert.staging import Scratch
from convert.summary import Summary
from convert.tasks import Job
from vlm_composer.plain_text import say

CONVERTER = 3
"""Goes up when the same sources and settings would give other shards: a run begun before is then
refused."""

SHARD_BYTES = 1 << 26
"""Of a shard, at most; what is larger cannot be a sample."""


def convert_llava(
    json_path: str | Path,
    images_root: str | Path,
    out: str | Path,
    *,
    eval_ratio: float = 0.02,
    max_samples: int | None = None,
    seed: int = 17,
    max_reject_ratio: float = 0.01,
    overwrite: bool = False,
    size_limit: int = SHARD_BYTES,
    show_progress: bool = True,
    drop_duplicates: bool = False,
    workers: int = 1,
) -> Summary:
    """Converts one LLaVA JSON and its images: `convert_pairs` of one source.

    Args:
        json_path: A JSON list of `{"id", "image", "conversations"}`, or a .jsonl of such items.
        images_root: What the items' `image` paths start from.
        out: As for `convert_pairs`, like all that follow.
        eval_ratio: Share held out for evaluation.
        max_samples: Samples to take; None takes them all.
        seed: Decides which samples are taken, and their side.
        max_reject_ratio: Share that may be rejected.
        overwrite: Delete a data set that `out` already holds.
        size_limit: Bytes of a shard.
        show_progress: Show a progress bar on stderr.
        drop_duplicates: Leave out copies.
        workers: Processes.

    Returns:
        What summary.json says.

    Raises:
        ConversionError: See `convert_pairs`.
        OSError: If the source cannot be read, or a file cannot be written.
    """
    _check_size_limit(size_limit)
    source = LlavaJson(json_path, images_root, max_image_bytes=size_limit)
    return convert_pairs(
        [source],
        out,
        eval_ratio=eval_ratio,
        max_samples=max_samples,
        seed=seed,
        max_reject_ratio=max_reject_ratio,
        overwrite=overwrite,
        size_limit=size_limit,
        show_progress=show_progress,
        drop_duplicates=drop_duplicates,
        workers=workers,
        arguments={"json": os.fspath(json_path), "images": os.fspath(images_root)},
    )


def convert_pairs(
    sources: Sequence[Source],
    out: str | Path,
    *,
    eval_ratio: float = 0.02,
    max_samples: int | None = None,
    seed: int = 17,
    max_reject_ratio: float = 0.01,
    drop_duplicates: bool = False,
    overwrite: bool = False,
    size_limit: int = SHARD_BYTES,
    workers: int = 1,
    engine: Engine | None = None,
    show_progress: bool = True,
    arguments: Mapping[str, Any] | None = None,
) -> Summary:
    """Converts pairs of images and texts to MDS shards for streaming's StreamingDataset.

    Writes `out`/train and `out`/eval, with hashes for every shard, or with several sources
    `out`/NAME/train and `out`/NAME/eval; `out`/rejects.jsonl, a line for each item that was left
    out; `out`/quality.json; and, when all else is there, `out`/summary.json. A side that gets no
    items is not written. Within a side, samples keep the source's order: shuffling is for training
    to do. No image is on both sides, not even of two sources.

    The same sources and settings give the same bytes, whatever the engine and its workers. A run
    that was ended, in any way, goes on where it stopped when it is called again.

    Args:
        sources: One, or several that have names.
        out: A folder, or s3://bucket/prefix, gs://bucket/prefix or azure://container/prefix. For a
            URL, at most four shards a worker (256 MB) are kept on the local disk at a time, under
            TMPDIR, and less than a hundred bytes an item.
        eval_ratio: Share of the samples held out for evaluation, at least 0 and below 1.
        max_samples: Take this many samples of all sources, picked by `seed`; None takes them all.
        seed: Decides which samples are taken, and their side. See `split.Split`.
        max_reject_ratio: Share of the samples taken, from 0 to 1, above which the run fails.
        drop_duplicates: Leave out all but the first of items with the same image and text.
        overwrite: Delete a data set that `out` already holds.
        size_limit: Bytes of a shard.
        workers: Processes, where no engine is given.
        engine: What runs the partitions.
        show_progress: Show a progress bar on stderr, and what is alarming about the samples.
        arguments: What else summary.json should say it takes to repeat the conversion.

    Returns:
        What summary.json says.

    Raises:
        ConversionError: If a setting is wrong, `out` holds a data set and `overwrite` is off or
            another process writes there, an upload fails, or more samples were rejected than
            `max_reject_ratio` allows. In the last case the shards are deleted and rejects.jsonl is
            kept.
        OSError: If a source cannot be read, or a file cannot be written.
    """
    started = time.monotonic()
    settings = {
        "eval_ratio": eval_ratio,
        "max_samples": max_samples,
        "seed": seed,
        "drop_duplicates": drop_duplicates,
        "size_limit": size_limit,
    }
    called = {
        **(arguments or {}),
        "out": os.fspath(out),
        **settings,
        "max_reject_ratio": max_reject_ratio,
        "overwrite": overwrite,
        "workers": workers,
    }
    _check_size_limit(size_limit)
    if not 0 <= max_reject_ratio <= 1:
        raise ConversionError(f"max_reject_ratio is {max_reject_ratio}: give a number from 0 to 1")
    names = _check_names(sources)
    engine = engine or LocalEngine(workers)

    with ExitStack() as open_until_the_end:
        for source in sources:
            open_until_the_end.callback(source.close)
        plan = {
            "sources": [{"name": source.name, **source.fingerprint()} for source in sources],
            **settings,
            "partitioning": PARTITIONING,
            "converter": CONVERTER,
        }
        scratch = open_until_the_end.enter_context(closing(Scratch()))
        partitions = Partitions(sources, engine, scratch.folder)
        split = Split(partitions.num_items, eval_ratio, max_samples, seed)
        destination = open_until_the_end.enter_context(open_destination(out))
        journal, summary = begin(destination, plan, overwrite, names)
        if summary is not None:
            return summary

        job = Job(sources, partitions.source_items, split, destination, size_limit)
        try:
            exceptions = compare_images(
                job, partitions, journal, engine, drop_duplicates, show_progress
            )
            write_shards(
                job, partitions, journal, engine, exceptions, max_reject_ratio, show_progress
            )
            summary, quality = merge(job, journal, called, started)
        except NoDataSet:
            destination.wait()
            for name in data_set_names(destination, names):
                destination.delete(name)
            journal.delete()
            raise
        journal.delete()
    for alarm in quality.alarms() if show_progress else ():
        say(f"convert: {alarm}")
    return summary


def _check_size_limit(size_limit: int) -> None:
    if not 0 < size_limit < 1 << 32:
        raise ConversionError(f"size_limit is {size_limit}: give bytes from 1 to {(1 << 32) - 1}")


def _check_names(sources: Sequence[Source]) -> list[str]:
    """The names that sources' folders get."""
    names = [source.name for source in sources]
    if len(names) == 1 and names[0] == "":
        return names
    for name in names:
        if not is_source_name(name):
            raise ConversionError(
                f"a source is called {name!r}: it becomes a folder, so give names of {NAMING}"
            )
    if len({*names}) < len(names) or not names:
        raise ConversionError(
            f"the sources are called {', '.join(names) or 'nothing'}: give each a name of its own"
        )
    return names
