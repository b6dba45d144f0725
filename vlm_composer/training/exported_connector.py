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
INDEX_FILE = "model.safetensors.index.json"
_CONNECTOR = "connector."


class ExportedConnector(CheckpointFile):
    """An export's connector in the place of a checkpoint, checked and read when it is opened.

    Args:
        folder: The export, or those of its files that `connector_files` names.
        url: Where it is, as its user wrote it.

    Raises:
        CheckpointError: Its connector is not the one that was exported, or is damaged.
        OSError: It cannot be read.
    """

    def __init__(self, folder: str | Path, url: str) -> None:
        self.path, self.url = Path(folder), url
        try:
            self.document = json.loads((self.path / FACTS_FILE).read_bytes())
            hashes: dict[str, str] = self.document["connector"]["hashes"]
            if self.document["format"] != FORMAT:
                raise CheckpointError(
                    f"{url} has format {self.document['format']}; this version reads {FORMAT}"
                )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{url}: {FACTS_FILE} is damaged ({error!r})") from error
        self._tensors: dict[str, Tensor] = {}
        for name in connector_files(self.path):
            with safe_open(self.path / name, "pt") as file:
                self._tensors |= {
                    key: file.get_tensor(key)
                    for key in set(file.keys())
                    if key.startswith(_CONNECTOR)
                }
        self.names = {WEIGHTS + name for name in self._tensors}
        for name, digest in hashes.items():
            if name not in self._tensors or hash_tensor(self._tensors[name]) != digest:
                raise CheckpointError(
                    f"{url}: {name} is not what was exported; export the checkpoint again"
                )

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU; names are those of a checkpoint."""
        return self._tensors[name.removeprefix(WEIGHTS)]


def connector_files(folder: Path) -> set[str]:
    """Names of the files that hold the connector; the index is there, if the export has one."""
    if not (folder / INDEX_FILE).is_file():
        return {WEIGHTS_FILE}
    index: dict[str, Any] = json.loads((folder / INDEX_FILE).read_bytes())
    return {file for key, file in index["weight_map"].items() if key.startswith(_CONNECTOR)}
