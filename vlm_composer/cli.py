"""The command `vlm-composer`: every tool of the project as a subcommand.

A subcommand's module describes its arguments (`add_arguments`) and does the work (`run`). It is
imported when the subcommand is asked for, as some of them import torch.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS = {
    "convert": ("convert.__main__", "Convert image–text pairs to MDS shards"),
    "inspect": ("convert.inspect", "Numbers and random samples of a data set, as a page"),
    "verify": ("convert.verify", "Check every shard, sample and image of a data set"),
    "preview": ("convert.preview", "Random items as a training run would read them"),
    "features": ("convert.features", "Precompute a frozen vision tower's features of a data set"),
    "train": ("vlm_composer.launcher", "Train a connector, through the Composer launcher"),
    "preflight": ("vlm_composer.launcher", "Check all that train needs, train nothing"),
    "plan": ("vlm_composer.plan", "Parameters, memory and time of a run, without weights"),
    "report": (
        "vlm_composer.report.__main__",
        "A run as a page: did the connector learn to see?",
    ),
    "export": ("vlm_composer.export.__main__", "Write a connector as a Hugging Face folder"),
    "caption": ("vlm_composer.caption", "Caption pictures with an export"),
    "demo": ("vlm_composer.demo.__main__", "Train between two real small towers on a CPU"),
}
"""By name: the module, and a line of help."""


class _Subcommand(argparse.ArgumentParser):
    """The parser of a subcommand, which imports its module at the first use."""

    module: str | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.module is None:
            return super().parse_known_args(args, namespace)
        module, self.module = import_module(self.module), None
        module.add_arguments(self)
        self.set_defaults(run=module.run)
        return self.parse_intermixed_args(args, namespace), []  # overrides may follow options


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command, which knows its subcommands by name only."""
    parser = argparse.ArgumentParser(
        prog="vlm-composer",
        description="Stage-1 connector training for vision-language models.",
        epilog="vlm-composer COMMAND --help describes a command.",
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Subcommand
    )
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text}.")
        command.module = module
    commands.choices["preflight"].set_defaults(preflight=True)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        nearest = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0)[0]
        parser.error(f"unknown command {arguments[0]!r}; did you mean {nearest!r}?")
    options = parser.parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
