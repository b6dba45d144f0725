"""The command line: `python -m convert --json FILE --images PLACE --out DEST`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from importlib import import_module

from convert import ConversionError, convert_pairs
from convert.conversion import SHARD_BYTES
from convert.engine import Engine
from convert.source_options import add_source_options, specs_of
from convert.sources.opening import SourceSpec, open_source
from vlm_composer.plain_text import say

TOOLS = {
    "inspect": "numbers and random samples of a data set, as a page",
    "verify": "check every shard, sample and image of a data set",
    "preview": "random items as a training run would read them",
    "features": "a frozen vision tower's patches of a data set, for training to read",
}
"""Each in a module of its own; everything else is the conversion."""


def main() -> int:
    """Convert, or run one of `TOOLS`, as the command line says; return the exit status."""
    if sys.argv[1:2] and sys.argv[1] in TOOLS:
        return int(import_module(f"convert.{sys.argv[1]}").main(sys.argv[2:]))
    tools = "\n".join(f"  python -m convert {name:<9} {what}" for name, what in TOOLS.items())
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        epilog=f"tools (each with a --help of its own):\n{tools}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args())


def run(args: argparse.Namespace) -> int:
    """Convert as `add_arguments` describes.

    Returns:
        The exit status: 0 when the data set is written, 1 when it is not, 130 when interrupted.
    """
    try:
        specs = specs_of(args)
        if args.engine == "spark" and args.workers is not None:
            raise ConversionError("--workers has no use with --engine spark: Spark has its own")
        summary = convert_pairs(
            [open_source(spec, SHARD_BYTES) for spec in specs],
            args.out,
            eval_ratio=args.eval_ratio,
            max_samples=args.max_samples,
            seed=args.seed,
            max_reject_ratio=args.max_reject_ratio,
            drop_duplicates=args.drop_duplicates,
            overwrite=args.overwrite,
            workers=len(os.sched_getaffinity(0)) if args.workers is None else args.workers,
            engine=_open_spark() if args.engine == "spark" else None,
            arguments={"sources": [_given(spec) for spec in specs], "engine": args.engine},
        )
    except (ConversionError, OSError) as error:
        say(f"convert: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"convert: interrupted: {args.out} is not complete; rerun the command to resume")
        return 130
    duplicates = f", {summary.duplicates} duplicates left out" if summary.duplicates else ""
    print(
        f"{summary.train} train and {summary.eval} eval samples in {args.out} "
        f"({summary.bytes / 1e6:.1f} MB, {summary.seconds:.1f} s), {summary.rejected} rejected"
        f"{duplicates}"
    )
    return 0


def _given(spec: SourceSpec) -> dict[str, str]:
    return {name: value for name, value in dataclasses.asdict(spec).items() if value}


def _open_spark() -> Engine:
    try:
        from convert.spark_engine import SparkEngine
    except ModuleNotFoundError as error:
        raise ConversionError(
            f"--engine spark needs {error.name}: pip install 'vlm-composer[spark]', and a Java of "
            "version 17 or 11"
        ) from error
    return SparkEngine()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = (
        "Convert images and what is said about them to MDS shards (train and eval)."
    )
    add_source_options(parser)
    add = parser.add_argument
    add("--out", required=True, metavar="DEST", help="folder, or s3://, gs:// or azure:// URL")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes; the data set is the same for any number (default: one a core)",
    )
    add(
        "--engine",
        choices=("local", "spark"),
        default="local",
        help="what runs them: this machine, or Spark as spark-submit or spark-defaults.conf set it "
        "(default: %(default)s)",
    )
    add(
        "--eval-ratio",
        type=float,
        default=0.02,
        metavar="R",
        help="share held out for evaluation (default: %(default)s)",
    )
    add(
        "--max-samples",
        type=int,
        metavar="N",
        help="take N samples, picked by --seed (default: all)",
    )
    add(
        "--seed",
        type=int,
        default=17,
        metavar="S",
        help="decides which samples are taken, and the split (default: %(default)s)",
    )
    add(
        "--max-reject-ratio",
        type=float,
        default=0.01,
        metavar="R",
        help="fail when a larger share is rejected (default: %(default)s)",
    )
    add(
        "--drop-duplicates",
        action="store_true",
        help="leave out all but the first of samples with the same image and text",
    )
    add(
        "--overwrite",
        action="store_true",
        help="delete a data set that DEST already holds, or what another command began there",
    )


if __name__ == "__main__":
    sys.exit(main())
