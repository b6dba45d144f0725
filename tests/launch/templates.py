"""Reads the launch templates: what each runs, and with which environment."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "yamls" / "launch"
SLURM = LAUNCH / "slurm.sbatch"


def mosaicml() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "mosaicml.yaml").read_text())


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def kubernetes() -> dict[str, dict[str, Any]]:
    """The manifests by kind."""
    documents = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def container() -> dict[str, Any]:
    (only,) = kubernetes()["Job"]["spec"]["template"]["spec"]["containers"]
    return only


def scripts() -> dict[str, str]:
    """What each platform's shells run, by platform."""
    return {
        "mosaicml": mosaicml()["command"],
        "slurm": SLURM.read_text(),
        "kubernetes": container()["args"][0],
        "skypilot": skypilot()["run"],
    }


def train_command(script: str) -> list[str]:
    """The words of the one command that trains."""
    whole = script.replace("\\\n", " ")
    (command,) = re.findall(r"^\s*exec (composer .*)$", whole, re.MULTILINE)
    return shlex.split(command)
