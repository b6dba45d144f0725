"""Features once, in place of images every epoch: `python -m convert.features YAML --out DEST`.

Runs the frozen vision tower of a training yaml over the yaml's data and writes its patches as MDS
shards. Training reads them in place of images where `train_loader.dataset` (and that of
`eval_loader`) points there. Of `convert/`, this command and its parts alone import model code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from convert.feature_pass import make_features
from vlm_composer.config import TrainConfig
from vlm_composer.plain_text import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m convert.features")
    add_arguments(parser)
    return run(parser.parse_intermixed_args(arguments))


def run(options: argparse.Namespace) -> int:
    """Make features as `add_arguments` describes.

    Returns:
        The exit status: 0 when they are written, 1 when they are not, 130 when interrupted.
    """
    try:
        summary = make_features(
            TrainConfig.read(options.yaml, options.overrides),
            options.out,
            dtype=options.dtype,
            device=options.device,
            batch_size=options.batch_size,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
        )
    except (ValueError, OSError) as error:  # ConversionError and ConfigError among them
        say(f"convert.features: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"convert.features: interrupted: {options.out} is not complete")
        return 130
    if summary is not None:
        print(
            f"{summary.train} train and {summary.eval} eval samples in {options.out} "
            f"({summary.bytes / 1e6:.1f} MB, {summary.seconds:.1f} s). Train with "
            f"train_loader.dataset.remote={options.out.rstrip('/')}/train and a cache of its own, "
            "eval_loader alike"
        )
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = (
        "Write a frozen vision tower's patches of a data set, for training to read."
    )
    add = parser.add_argument
    add("yaml", metavar="YAML", help="the training yaml, with data sets of images")
    add("overrides", nargs="*", default=[], metavar="key=value", help="as for train.py")
    add("--out", required=True, metavar="DEST", help="folder, or s3://, gs:// or azure:// URL")
    add(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="what patches are rounded to (default: the tower's own, which loses nothing)",
    )
    add("--device", choices=("cpu", "gpu"), help="where the tower runs (default: the yaml's)")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="images the tower sees at a time (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="delete a data set that DEST already holds")
    add("--dry-run", action="store_true", help="print size and break-even, write nothing")


if __name__ == "__main__":
    sys.exit(main())
