"""The command line: `python -m convert --json FILE --images DIR --out DEST`."""

import argparse
import sys
from importlib import import_module

from convert import ConversionError, convert_llava

COMMANDS = ("inspect", "verify", "preview")
"""Each in a module of its own with a `main`; everything else is the conversion."""


def main() -> int:
    """Converts, or runs one of `COMMANDS`, as the command line says.

    Returns:
        The exit status: 0 when the data set is written, 1 when it is not, 130 when interrupted.
    """
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return int(import_module(f"convert.{sys.argv[1]}").main(sys.argv[2:]))
    args = _parser().parse_args()
    try:
        summary = convert_llava(
            args.json,
            args.images,
            args.out,
            eval_ratio=args.eval_ratio,
            max_samples=args.max_samples,
            seed=args.seed,
            max_reject_ratio=args.max_reject_ratio,
            overwrite=args.overwrite,
        )
    except (ConversionError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"convert: interrupted: {args.out} is not complete", file=sys.stderr)
        return 130
    print(
        f"{summary.train} train and {summary.eval} eval samples in {args.out} "
        f"({summary.bytes / 1e6:.1f} MB, {summary.seconds:.1f} s), {summary.rejected} rejected"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert a LLaVA JSON and its images to MDS shards (train and eval).",
    )
    add = parser.add_argument
    add("--json", required=True, metavar="FILE", help="LLaVA JSON, a list of items")
    add("--images", required=True, metavar="DIR", help="folder that the items' image paths are in")
    add("--out", required=True, metavar="DEST", help="folder, or s3://, gs:// or azure:// URL")
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
    add("--overwrite", action="store_true", help="delete a data set that DEST already holds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
