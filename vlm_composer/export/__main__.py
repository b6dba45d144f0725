"""Command line of the export: `python -m vlm_composer.export CHECKPOINT --out DIR`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from vlm_composer.export.exporting import export_checkpoint
from vlm_composer.plain_text import say
from vlm_composer.training.logging_setup import log_to_stderr

log = logging.getLogger("vlm_composer.export")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlm_composer.export")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = (
        "Write a trained connector as a folder that transformers loads (trust_remote_code=True) "
        "where this project is not."
    )
    parser.add_argument(
        "checkpoint", help="a checkpoint, or a folder or URL (s3://, …) for the newest in it"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="empty or new folder")
    parser.add_argument(
        "--yaml", help="the run's, where the settings in the checkpoint do not do (towers moved)"
    )
    parser.add_argument(
        "--with-towers",
        action="store_true",
        help="write the towers' weights too, after comparing them with the run's; without it the "
        "folder names the towers and holds the connector",
    )
    parser.add_argument(
        "--dtype",
        choices=("trained", "bf16", "fp32"),
        default="trained",
        help="of the weights; trained: the connector in fp32, the towers as they were (default)",
    )
    parser.add_argument(
        "--prompt",
        help="what the export asks by default, with one <image>; without it the commonest prompt "
        "of the training data, where the quality.json beside the shards is at hand",
    )


def run(options: argparse.Namespace) -> int:
    """Export as `add_arguments` describes; return 1 where that failed."""
    log_to_stderr()
    try:
        out = export_checkpoint(
            options.checkpoint,
            options.out,
            yaml=options.yaml,
            with_towers=options.with_towers,
            dtype=options.dtype,
            prompt=options.prompt,
        )
    except (ValueError, OSError) as error:
        log.debug("Export failed", exc_info=True)
        say(f"error: {error}")
        return 1
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB; complete the licence in its README.md before you share it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
