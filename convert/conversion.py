"""The whole conversion, from a LLaVA JSON and its images to MDS shards."""

import os
import sys
import time
from contextlib import closing
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from convert.destination import (
    REJECTS,
    SUMMARY,
    claim,
    delete_shards,
    open_destination,
)
from convert.errors import ConversionError, Rejected
from convert.record import read_record
from convert.sources import LlavaJson, Source
from convert.split import SIDES, Side, assign_sides, exact
from convert.summary import Spread, Summary
from convert.writer import RejectLog, ShardWriter, publish_data_set


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
    size_limit: int = 1 << 26,
    show_progress: bool = True,
) -> Summary:
    """Converts a LLaVA JSON and its images to MDS shards for streaming's StreamingDataset.

    Writes `out`/train and `out`/eval, with hashes for every shard; `out`/rejects.jsonl, a line for
    each item that was left out; and, when all else is there, `out`/summary.json. A side that gets
    no items is not written. Within a side, samples keep the source's order: shuffling is for
    training to do.

    Args:
        json_path: A JSON list of `{"id", "image", "conversations"}`.
        images_root: The folder that the items' `image` paths start from.
        out: A folder, or s3://bucket/prefix, gs://bucket/prefix or azure://container/prefix. For a
            URL, at most about 1 GB is kept on the local disk at a time (under TMPDIR).
        eval_ratio: Share of the samples held out for evaluation, at least 0 and below 1.
        max_samples: Take this many samples of the source, picked by `seed`; None takes them all.
        seed: Decides which samples are taken, and their side. See `split.assign_sides`.
        max_reject_ratio: Share of the samples taken, from 0 to 1, above which the run fails.
        overwrite: Delete a data set that `out` already holds.
        size_limit: Bytes of a shard.
        show_progress: Show a progress bar on stderr.

    Returns:
        What summary.json says.

    Raises:
        ConversionError: If a setting is wrong, `out` holds a data set and `overwrite` is off, an
            upload fails, or more samples were rejected than `max_reject_ratio` allows. In the last
            case the shards are deleted and rejects.jsonl is kept.
        OSError: If the source cannot be read, or a file cannot be written.
    """
    arguments = {
        "json": os.fspath(json_path),
        "images": os.fspath(images_root),
        "out": os.fspath(out),
        "eval_ratio": eval_ratio,
        "max_samples": max_samples,
        "seed": seed,
        "max_reject_ratio": max_reject_ratio,
        "overwrite": overwrite,
        "size_limit": size_limit,
    }
    started = time.monotonic()
    if not 0 <= max_reject_ratio <= 1:
        raise ConversionError(f"max_reject_ratio is {max_reject_ratio}: give a number from 0 to 1")
    if not 0 < size_limit < 1 << 32:
        raise ConversionError(f"size_limit is {size_limit}: give bytes from 1 to {(1 << 32) - 1}")
    source = LlavaJson(json_path, images_root, max_image_bytes=size_limit)
    sides = assign_sides(len(source), eval_ratio, max_samples, seed)

    with closing(open_destination(out)) as destination:
        claim(destination, overwrite)
        writers = {s: ShardWriter(destination, s, size_limit) for s in SIDES if s in sides}
        with closing(RejectLog(destination.folder / REJECTS)) as rejects:
            images = _write_samples(source, sides, writers, rejects, show_progress)
        destination.publish(REJECTS)

        samples_in = len(sides) - sides.count(None)
        num_samples = {side: writer.num_samples for side, writer in writers.items()}
        try:
            _check_rejects(rejects, samples_in, num_samples, max_reject_ratio, destination.out)
        except ConversionError:
            destination.wait()
            delete_shards(destination)
            raise

        # From here on it is a data set. The summary goes last.
        publish_data_set(destination, writers)
        summary = Summary(
            source_items=len(source),
            samples_in=samples_in,
            train=num_samples.get("train", 0),
            eval=num_samples.get("eval", 0),
            rejected=rejects.by_reason.total(),
            rejected_by_reason=dict(rejects.by_reason.most_common()),
            shards={side: writer.num_shards for side, writer in writers.items()},
            bytes=sum(writer.num_bytes for writer in writers.values()),
            seconds=round(time.monotonic() - started, 3),
            images={name: Spread.of(numbers) for name, numbers in images.items()},
            arguments=arguments,
        )
        (destination.folder / SUMMARY).write_text(summary.to_json(), encoding="utf-8")
        destination.publish(SUMMARY)
        destination.wait()
    return summary


def _write_samples(
    source: Source,
    sides: list[Side | None],
    writers: dict[Side, ShardWriter],
    rejects: RejectLog,
    show_progress: bool,
) -> dict[str, list[int]]:
    images: dict[str, list[int]] = {"width": [], "height": [], "bytes": []}
    progress = tqdm(
        desc="convert",
        total=len(sides) - sides.count(None),
        unit=" samples",
        disable=not show_progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants few lines
    )
    with progress:
        for index, (item, side) in enumerate(zip(source.items(), sides, strict=True)):
            if side is None:
                continue
            try:
                record, (width, height) = read_record(item, source)
                writers[side].write(record)
            except Rejected as rejected:
                rejects.add(index, item, rejected)
                progress.set_postfix(rejected=rejects.by_reason.total(), refresh=False)
            else:
                images["width"].append(width)
                images["height"].append(height)
                images["bytes"].append(len(record["image"]))
            progress.update()
    return images


def _check_rejects(
    rejects: RejectLog,
    samples_in: int,
    num_samples: dict[Side, int],
    max_reject_ratio: float,
    out: str,
) -> None:
    rejected = rejects.by_reason.total()
    if rejected > exact(max_reject_ratio) * samples_in:
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in rejects.by_reason.most_common()
        )
        raise ConversionError(
            f"{rejected} of {samples_in} samples were rejected ({reasons}): a share of "
            f"{rejected / samples_in:.4g}, above max_reject_ratio {max_reject_ratio:.4g}. No data "
            f"set was written. See {out.rstrip('/')}/{REJECTS}; mend the source, or raise "
            "--max-reject-ratio"
        )
    for side, count in num_samples.items():
        if count == 0:
            raise ConversionError(
                f"all samples of {side} were rejected. No data set was written. See "
                f"{out.rstrip('/')}/{REJECTS} and mend the source"
            )
