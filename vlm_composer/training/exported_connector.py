"""The connector of an exported folder, as a run starts from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm_composer.training.checkpoint_file import (
    SUFFIX,
    CheckpointError,
    CheckpointFile,
    check_format,
    hash_tensor,
)
from vlm_composer.training.checkpoint_schema import EXPORT, TEXTS, WEIGHTS, schema_fault

FACTS_FILE = "vlm_composer.json"
"""Beside an export's weights: which run it is of, the towers' identity, hashes of the connector."""
FORMAT = 1
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_CONNECTOR = "connector."
_FILE = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]*{re.escape(SUFFIX)}")
"""Names of files that are joined to a folder and downloaded: never a path."""


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
        self.document = _read_object(self.path / FACTS_FILE, url)
        check_format(self.document, FORMAT, url)
        if fault := schema_fault(self.document, EXPORT):
            raise CheckpointError(f"{url}: {FACTS_FILE} is malformed: {fault}; export again")
        hashes: dict[str, str] = self.document["connector"]["hashes"]
        self._tensors: dict[str, Tensor] = {}
        for name in connector_files(self.path, url):
            try:
                with safe_open(self.path / name, "pt") as file:
                    self._tensors |= {
                        key: file.get_tensor(key)
                        for key in set(file.keys())
                        if key.startswith(_CONNECTOR)
                    }
            except SafetensorError as error:
                raise CheckpointError(f"{url}: {name} is damaged ({error})") from error
        self.names = {WEIGHTS + name for name in self._tensors}
        for name, digest in hashes.items():
            if name not in self._tensors or hash_tensor(self._tensors[name]) != digest:
                raise CheckpointError(
                    f"{url}: {name} is not what was exported; export the checkpoint again"
                )

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU; names are those of a checkpoint."""
        return self._tensors[name.removeprefix(WEIGHTS)]


def connector_files(folder: Path, url: str) -> set[str]:
    """Return the names of the files that hold the connector, all of them in the folder itself.

    Args:
        folder: Has the index, if the export has one.
        url: Where the export is, as its user wrote it.

    Raises:
        CheckpointError: The index is damaged, or names a file elsewhere.
    """
    if not (folder / INDEX_FILE).is_file():
        return {WEIGHTS_FILE}
    index = _read_object(folder / INDEX_FILE, url)
    if fault := schema_fault(index, {"weight_map": TEXTS}):
        raise CheckpointError(f"{url}: {INDEX_FILE} is malformed: {fault}; export again")
    files = {file for key, file in index["weight_map"].items() if key.startswith(_CONNECTOR)}
    for file in files:
        if not _FILE.fullmatch(file):
            raise CheckpointError(
                f"{url}: {INDEX_FILE} names {file[:80]!r}, which is not a safetensors file of the "
                "export; export again"
            )
    return files


def _read_object(path: Path, url: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{url}: {path.name} is damaged ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{url}: {path.name} is damaged: it is not an object")
    return found
