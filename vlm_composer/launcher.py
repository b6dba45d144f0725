"""`vlm-composer train` and `preflight`: start `train.py` through the Composer launcher."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import typing
from pathlib import Path

LAUNCHER_OPTIONS = {
    "nproc": ("N", "ranks on this node (default: one a GPU; one without GPUs)"),
    "world_size": ("N", "ranks on all nodes (default: those of this node)"),
    "node_rank": ("N", "number of this node, from 0"),
    "base_rank": ("N", "number of this node's first rank, where nodes differ in ranks"),
    "master_addr": ("HOST", "address of node 0"),
    "master_port": ("PORT", "a free port of node 0, the same on every node"),
    "stdout": ("FILE", "for the other ranks' stdout, with {rank} in its name"),
    "stderr": ("FILE", "for the other ranks' stderr, with {rank} in its name"),
}
"""Options of the Composer launcher, which checks their values."""

_EPILOG = """sections of the yaml:
{sections}

Every key with its type and default: docs/config.md. A complete example: yamls/stage1.yaml."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills in the sections of the yaml, whose schema imports torch, where help is asked for."""

    def add_text(self, text: str | None) -> None:
        super().add_text(_EPILOG.format(sections=_sections()) if text == _EPILOG else text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of both commands to a parser."""
    parser.formatter_class = _HelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--preflight", action="store_true", help="check everything, train nothing")
    parser.add_argument("yaml", metavar="YAML", help="the training yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="values in place of the yaml's",
    )
    group = parser.add_argument_group("options of the Composer launcher")
    for name, (metavar, text) in LAUNCHER_OPTIONS.items():
        short = ["-n"] if name == "nproc" else []
        group.add_argument(*short, f"--{name}", metavar=metavar, help=text)
    group.add_argument("-v", "--verbose", action="store_true", help="log what the launcher does")


def run(options: argparse.Namespace) -> int:
    """Become the launcher, as `composer vlm_composer/train.py YAML …` starts it."""
    # -P: as of the script `composer`, the working directory is not on the launcher's path.
    command = [sys.executable, "-P", "-m", "composer.cli"]
    for name in LAUNCHER_OPTIONS:
        if (value := getattr(options, name)) is not None:
            command += [f"--{name}", value]
    command += ["--verbose"] if options.verbose else []
    command += [str(Path(__file__).with_name("train.py")), options.yaml, *options.overrides]
    command += ["--preflight"] if options.preflight else []
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _sections() -> str:
    """A line for each section of the schema: its key and what it is."""
    from vlm_composer.config import TrainConfig

    lines = []
    for name, hint in typing.get_type_hints(TrainConfig).items():
        for kind in (hint, *typing.get_args(hint)):
            if inspect.isclass(kind) and kind.__module__.startswith("vlm_composer.config."):
                text = " ".join((inspect.getdoc(kind) or "").split())
                lines.append(f"  {name:<15} {text.split('. ')[0].rstrip('.')}")
    return "\n".join(lines)
