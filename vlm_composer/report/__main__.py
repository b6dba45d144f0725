"""`python -m vlm_composer.report RUN_DIR [--out FILE]`: a run as one page of HTML.

It says first whether the connector learned to see, then shows captions, curves, and what the run
was. The page needs no network and may be sent to others. It can be written while the run goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm_composer.plain_text import say
from vlm_composer.report.run_folder import ReportError
from vlm_composer.report.write import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlm_composer.report")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = __doc__
    parser.add_argument("run_dir", type=Path, help="the run's folder, with metrics.jsonl")
    parser.add_argument("--out", type=Path, help="the file (default: report.html in the folder)")


def run(options: argparse.Namespace) -> int:
    """Write the page and print its path; return 1 where there is no run."""
    try:
        print(write_report(options.run_dir, options.out))
    except ReportError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
