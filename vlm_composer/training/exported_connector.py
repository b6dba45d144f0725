"""The connector of an exported folder, as a run starts from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from vlm_composer.training.checkpoint_file import (
    WEIGHTS,
    CheckpointError,
    CheckpointFile,
    hash_tensor,
)

FACTS_FILE = "vlm_composer.json"
"""Beside an export's weights: which run it is of, the towers' identity, hashes of the connector."""
FORMAT = 1
WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


def is_export(folder: str | Path) -> bool:
    """Whether a folder is what `python -m vlm_composer.export` wrote."""
    return Path(folder, FACTS_FILE).is_file()


class ExportedConnector(CheckpointFile):
    """An export's connector in the place of a checkpoint, checked when it is opened.

    Args:
        folder: The export.

    Raises:
        CheckpointError: Its connector is not the one that was exported, or is damaged.
        OSError: It cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        try:
            self.document = json.loads((self.path / FACTS_FILE).read_bytes())
            hashes: dict[str, str] = self.document["connector"]["hashes"]
            if self.document["format"] != FORMAT:
                raise CheckpointError(
                    f"{folder} has format {self.document['format']}; this version reads {FORMAT}"
                )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{folder}: {FACTS_FILE} is damaged ({error!r})") from error
        self._files = _files_of(self.path)
        self.names = {WEIGHTS + name for name in self._files if name.startswith("connector.")}
        for name, digest in hashes.items():
            if name not in self._files or hash_tensor(self.tensor(WEIGHTS + name)) != digest:
                raise CheckpointError(
                    f"{folder}: {name} is not what was exported; export the checkpoint again"
                )

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, onto the CPU; names are those of a checkpoint."""
        name = name.removeprefix(WEIGHTS)
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)


def _files_of(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a folder that transformers wrote."""
    if (folder / _INDEX_FILE).is_file():
        index: dict[str, Any] = json.loads((folder / _INDEX_FILE).read_bytes())
        return {name: folder / file for name, file in index["weight_map"].items()}
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS_FILE)
