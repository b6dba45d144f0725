"""Caption pictures with an export: `python -m vlm_composer.caption DIR IMAGE…`.

Prints a JSON object a line, in the order of the pictures: `{"image": …, "caption": …}`, or
`{"image": …, "error": …}` for one that cannot be read. The exit code is 1 where there was any.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from vlm_composer.export.loading import caption_images, load_export
from vlm_composer.export.pictures_at import Picture, find_pictures
from vlm_composer.plain_text import say
from vlm_composer.read_ahead import map_ahead


def caption_pictures(
    model: Any,
    processor: Any,
    pictures: Iterable[Picture],
    prompt: str | None = None,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
) -> Iterator[dict[str, str]]:
    """Caption pictures, a batch at a time.

    Args:
        model: As `load_export` returns it.
        processor: Of the same export.
        pictures: What to caption.
        prompt: The question; the export's default prompt when None.
        batch_size: Pictures captioned together.
        max_new_tokens: Longest caption in tokens.

    Yields:
        `{"image", "caption"}` or `{"image", "error"}`, in the order of the pictures.
    """
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
        contextlib.closing(map_ahead(threads, _open, pictures, 2 * batch_size)) as opened,
    ):
        while batch := list(itertools.islice(opened, batch_size)):
            images = [image for _, image in batch if not isinstance(image, str)]
            captions = iter(
                caption_images(model, processor, images, prompt, max_new_tokens=max_new_tokens)
                if images
                else []
            )
            for name, image in batch:
                if isinstance(image, str):
                    yield {"image": name, "error": image}
                else:
                    yield {"image": name, "caption": next(captions)}


def _open(picture: Picture) -> tuple[str, Image.Image | str]:
    return picture.name, picture.open()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlm_composer.caption")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """Caption as `add_arguments` describes; return 1 where a picture was not captioned."""
    try:
        pictures = list(find_pictures(options.images))
        model, processor = load_export(
            options.export,
            device=options.device,
            dtype=options.dtype,
            vision_tower=options.vision_tower,
            language_model=options.language_model,
        )
        say(f"prompt: {options.prompt or processor.default_prompt!r}")
        with _output(options.out) as out:
            rows = caption_pictures(
                model,
                processor,
                pictures,
                options.prompt,
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
            )
            errors = 0
            for row in tqdm(rows, total=len(pictures), unit="image", unit_scale=False):
                errors += "error" in row
                print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 1
    if errors:
        say(f"{errors} of {len(pictures)} pictures could not be read")
    return 1 if errors else 0


def _output(path: str | None) -> contextlib.AbstractContextManager[IO[str]]:
    if path is None:
        return contextlib.nullcontext(sys.stdout)
    return open(path, "w", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = (
        "Caption pictures with a folder that python -m vlm_composer.export wrote. Prints a JSON "
        "object a line."
    )
    parser.add_argument("export", metavar="DIR", help="the export")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders, globs, and URLs of buckets (s3://, gs://, azure://)",
    )
    parser.add_argument(
        "--prompt",
        help="what is asked; <image> is appended where it is missing (default: the export's own, "
        "the commonest of its training data where that was at hand)",
    )
    parser.add_argument("--batch-size", type=_positive, default=8, help="images at a time (8)")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, help="longest caption (64)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: a GPU if there is"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the weights; auto: as trained, but fp32 where bf16 is slow",
    )
    parser.add_argument("--vision-tower", help="where the vision tower is, if not as exported")
    parser.add_argument("--language-model", help="where the language model is, if not as exported")
    parser.add_argument("--out", metavar="FILE", help="write there; stdout if left out")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
