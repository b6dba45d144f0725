"""What is in a data set? `python -m convert inspect DEST` shows its numbers and random samples."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from convert.errors import ConversionError, Rejected
from convert.images import check_image
from convert.inspect_page import Picture, render_page
from convert.overview import FoundSample, Inspection, Overview
from convert.split import SIDES, Side
from vlm_composer.images.pil import open_image, to_rgb
from vlm_composer.plain_text import plain, say

PAGE = "inspect.html"
SHEET = "inspect.png"

_COLUMNS = 4
_SIDE = 480
"""Pixels of a shown image, at most, along its longer side."""

_BAR = 30  # characters


@dataclass(frozen=True)
class Report:
    """What `inspect_data_set` has found and written."""

    overview: Overview
    page: Path
    """One self-contained HTML file."""

    sheet: Path
    """The samples as one PNG."""


def inspect_data_set(
    place: str | Path,
    *,
    side: Side = "train",
    samples: int = 16,
    seed: int = 17,
    out: str | Path = ".",
) -> Report:
    """Looks at a data set, and writes a page and a contact sheet of random samples.

    Of the shards no more is read than the samples take, in a bucket as well.

    Args:
        place: A folder, or s3://bucket/prefix, gs://bucket/prefix or azure://container/prefix; of
            one source, or of several.
        side: Where the samples are from.
        samples: How many, of each source.
        seed: Decides which.
        out: The folder that is written to; it is made where it is missing.

    Raises:
        ConversionError: If there is no data set of images, no such side, or a sample of it cannot
            be read.
        OSError: If the store cannot be used, or a file cannot be written.
    """
    if samples < 1:
        raise ConversionError(f"--samples is {samples}: give at least 1")
    inspection = Inspection(str(place))
    pictures = [_picture(sample) for sample in inspection.pick(side, samples, seed)]
    overview = inspection.overview(side, seed)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(overview, folder / PAGE, folder / SHEET)
    report.page.write_text(render_page(overview, pictures), encoding="utf-8")
    _sheet(pictures).save(report.sheet)
    return report


def _picture(sample: FoundSample) -> Picture:
    """Decodes a sample's image; one that is broken is grey."""
    try:
        size = check_image(sample.record["image"])
    except Rejected as rejected:
        return Picture(sample, Image.new("RGB", (64, 64), "grey"), (64, 64), str(rejected))
    with open_image(sample.record["image"]) as file:
        image = to_rgb(file)
    image.thumbnail((_SIDE, _SIDE))
    return Picture(sample, image, size)


def _sheet(pictures: Sequence[Picture]) -> Image.Image:
    from vlm_composer.data.contact_sheet import Cell, Text, draw_contact_sheet

    return draw_contact_sheet(
        [
            Cell(
                picture.image,
                (
                    Text(picture.sample.record["answer"], lines=3),
                    Text(picture.place, "#666666", lines=2),
                    Text(picture.described, "#666666"),
                ),
            )
            for picture in pictures
        ],
        columns=_COLUMNS,
    )


def describe(overview: Overview) -> Iterator[str]:
    """The numbers for a terminal, line by line."""
    yield overview.place
    for side in overview.counts:
        yield (
            f"  {plain(side.folder.path):<24} {side.samples:>13,} samples "
            f"{side.shards:>8,} shards {side.bytes / 1e6:>12,.1f} MB"
        )
    yield f"\nOf {overview.basis}:"
    for table in overview.tables:
        yield f"\n{table.title}"
        most = max((count for _, count in table.rows), default=0) or 1
        for label, count in table.rows:
            bar = "█" * round(_BAR * count / most)
            yield f"  {plain(label, 44):<44} {count:>13,} {bar}".rstrip()
    yield "\nHow it was made"
    for name, value in overview.facts:
        yield f"  {plain(name, 44):<44} {plain(value, 200)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m convert inspect")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(options: argparse.Namespace) -> int:
    """Inspect as `add_arguments` describes.

    Returns:
        The exit status: 0 when the page is written, 1 when it is not, 130 when interrupted.
    """
    try:
        report = inspect_data_set(
            options.dest,
            side=options.side,
            samples=options.samples,
            seed=options.seed,
            out=options.out,
        )
    except (ConversionError, OSError) as error:
        say(f"convert inspect: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    print("\n".join(describe(report.overview)))
    print(f"\nRandom samples: {report.page} and {report.sheet}")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = (
        "Print a data set's numbers, and write a page and a contact sheet of random "
        f"samples ({PAGE}, {SHEET})."
    )
    add = parser.add_argument
    add(
        "dest", metavar="DEST", help="folder, or s3://, gs:// or azure:// URL that was converted to"
    )
    add(
        "--side", choices=SIDES, default="train", help="where the samples are from (default: train)"
    )
    add(
        "--samples",
        type=int,
        default=16,
        metavar="N",
        help="random samples, of each source (default: %(default)s)",
    )
    add("--seed", type=int, default=17, metavar="S", help="decides which (default: %(default)s)")
    add("--out", default=".", metavar="DIR", help="where the two files go (default: here)")
