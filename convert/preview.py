"""What will the model see? `python -m convert preview JSON --images IMAGES`, before converting."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from convert.conversion import SHARD_BYTES
from convert.errors import ConversionError, Rejected
from convert.record import count_turns, read_record
from convert.source_options import add_source_options, specs_of
from convert.sources.opening import SourceSpec, open_source
from convert.sources.source import Item, Source
from convert.token_view import TokenView, draw_tokens
from vlm_composer.assembly import assemble_template, vision_settings
from vlm_composer.config import TrainConfig
from vlm_composer.plain_text import plain, say

DEFAULT_YAML = Path("yamls/stage1.yaml")
_MOST_FILES = 4
"""Of a source that items are picked from: to list the items of a tar takes its whole length."""

_MOST_PIECES = 1 << 12
"""Of a file that items are picked from: a million items."""


@dataclass(frozen=True)
class PickedItem:
    """An item of a source."""

    file: str
    number: int
    """Its place in the file, from 0."""

    item: Item


class Previewer:
    """Tells how training would read items.

    Args:
        config: The run.

    Raises:
        ConversionError: If the tokenizer cannot be loaded, or is none to train with.
    """

    def __init__(self, config: TrainConfig) -> None:
        name = config.language_model.tokenizer or config.language_model.name
        try:
            template = assemble_template(config)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConversionError(
                f"the tokenizer {name} cannot be used ({reason}): give --tokenizer FOLDER, a "
                "folder with the tokenizer's files (tokenizer.json, tokenizer_config.json, …)"
            ) from error
        self._max_seq_len = config.max_seq_len
        self._view = TokenView(template, config.add_bos)
        self.image_size, self.image_note = _image_size(config)

    def lines(self, picked: PickedItem, *, width: int, colours: bool) -> Iterator[str]:
        """Describe an item for a terminal.

        Args:
            picked: The item.
            width: Characters of a line.
            colours: Colour the tokens.
        """
        place = f"{plain(picked.file)}, item {picked.number}"
        try:
            record, size = read_record(picked.item)
        except Rejected as rejected:
            yield f"{place}: would be rejected: {plain(str(rejected), 500)}"
            return
        yield f"{place}: id {plain(record['id'], 100)}"
        yield f"image     {size[0]} × {size[1]} pixels, {len(record['image']) / 1000:.1f} kB" + (
            f" → {self.image_size} × {self.image_size}" if self.image_size else ""
        )
        yield f"prompt    {plain(record['prompt'])}"
        yield f"answer    {plain(record['answer'])}"
        if turns := count_turns(picked.item).dropped:
            yield f"dropped   {turns} turns that are not of the first round"
        try:
            tokens = self._view.tokens(record)
        except ValueError as error:
            yield f"training would fail: {error}"
            return
        roles = Counter(token.role for token in tokens)
        yield (
            f"tokens    {len(tokens) - roles['cut']} (max_seq_len {self._max_seq_len}): "
            f"{roles['prompt']} of the prompt, {roles['image']} of the image, {roles['loss']} of "
            f"the answer; {roles['cut'] or 'none'} cut"
        )
        yield from draw_tokens(tokens, width=width, colours=colours)


def pick_items(source: Source, count: int, seed: int) -> tuple[list[PickedItem], int]:
    """Take random items of a source, in its order.

    Of a large source, they are from the first million items of four random files.

    Args:
        source: Of which.
        count: How many, at most.
        seed: Decides which.

    Returns:
        The items, and how many they were picked from.

    Raises:
        ConversionError: If the source is not what it should be.
    """
    chance = random.Random(seed)
    files = source.files()
    chosen = sorted(chance.sample(range(len(files)), min(_MOST_FILES, len(files))))
    pieces = [
        (files[index], piece)
        for index in chosen
        for piece in islice(source.pieces(files[index]), _MOST_PIECES)
    ]
    total = sum(piece.count for _, piece in pieces)
    wanted = {*chance.sample(range(total), min(count, total))}
    found, first, in_file, previous = [], 0, 0, None
    for file, piece in pieces:
        in_file = 0 if file != previous else in_file
        mask = [first + index in wanted for index in range(piece.count)]
        if any(mask):
            found += [
                PickedItem(file, in_file + item.index, item) for item in source.read(piece, mask)
            ]
        first, in_file, previous = first + piece.count, in_file + piece.count, file
    return found, total


def _image_size(config: TrainConfig) -> tuple[int | None, str | None]:
    """The side of the tower's images in pixels; or why it is not known."""
    try:
        return vision_settings(config).image_size, None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        return None, f"the vision tower's image size is not known ({reason})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m convert preview")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(options: argparse.Namespace) -> int:
    """Preview as `add_arguments` describes.

    Returns:
        The exit status: 0 when items were shown, 1 when they could not be, 130 when interrupted.
    """
    width = shutil.get_terminal_size((100, 24)).columns
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    try:
        if options.count < 1:
            raise ConversionError(f"--count is {options.count}: give at least 1")
        specs = _specs(options)
        previewer = Previewer(_config(options))
        if previewer.image_note:
            say(previewer.image_note)
        for spec in specs:
            with closing(open_source(spec, SHARD_BYTES)) as source:
                picked, total = pick_items(source, options.count, options.seed)
                of = f" of {spec.name}" if spec.name else ""
                print(f"{len(picked)} of {total:,} items{of}, picked at random")
                for item in picked:
                    print("\n" + "\n".join(previewer.lines(item, width=width, colours=colours)))
    except (ValueError, OSError) as error:  # ConversionError and ConfigError among them
        say(f"convert preview: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _specs(options: argparse.Namespace) -> list[SourceSpec]:
    if options.positional_json is not None:
        if options.json is not None:
            raise ConversionError(
                f"give one JSON, not {options.positional_json} and {options.json}"
            )
        options.json = options.positional_json
    return specs_of(options)


def _config(options: argparse.Namespace) -> TrainConfig:
    if options.yaml is None and not DEFAULT_YAML.is_file():
        raise ConversionError(f"there is no {DEFAULT_YAML} here: give --yaml, the training yaml")
    config = TrainConfig.read(options.yaml or DEFAULT_YAML)
    if options.tokenizer is not None:
        config.language_model.tokenizer = options.tokenizer
        config.language_model.revision = None  # of another repository
    return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = (
        "Show random items as a training run would read them: text, image tokens, and "
        "which tokens bear loss."
    )
    add = parser.add_argument
    add("positional_json", nargs="?", metavar="JSON", help="the same as --json")
    add_source_options(parser)
    add("--yaml", metavar="YAML", help=f"the training yaml (default: {DEFAULT_YAML})")
    add("--tokenizer", metavar="NAME", help="folder or hub id, in place of the yaml's")
    add(
        "--count",
        type=int,
        default=10,
        metavar="N",
        help="random items, of each source (default: %(default)s)",
    )
    add("--seed", type=int, default=17, metavar="S", help="decides which (default: %(default)s)")
