"""A checkpoint as a file: tensors and a JSON document in the safetensors format.

Nothing in such a file can be run, whoever wrote it: reading it makes tensors, numbers and text.
A hash of every tensor and of the document tells a damaged file from a whole one, a schema what a
stranger wrote from what a run saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.training.checkpoint_schema import WEIGHTS, document_fault, tensors_fault

FORMAT = 1
SUFFIX = ".safetensors"
_DOCUMENT, _DIGEST = "vlm_composer", "vlm_composer_digest"


class CheckpointError(ValueError):
    """A file is not a checkpoint of this project, is damaged, or does not fit the run."""


class CheckpointFile:
    """A checkpoint on the local disk, checked when it is opened.

    Args:
        path: The file.
        url: Where its user knows it to be, for messages; by default the path.

    Raises:
        CheckpointError: It is not a checkpoint of this project, or it is damaged.
        OSError: It cannot be read.
    """

    def __init__(self, path: str | Path, url: str | None = None) -> None:
        self.path = Path(path)
        self.url = url or str(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no checkpoint at {self.url}")
        try:
            with safe_open(self.path, "pt") as file:
                self.names = set(file.keys())
                self.document = self._read_document(file.metadata() or {})
                self._check_tensors(file)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.url} is not a checkpoint of vlm_composer, or not a whole one ({error}). "
                "Checkpoints in torch's own format are not loaded: loading them runs what they say"
            ) from error
        except OSError as error:  # safetensors names no file
            raise OSError(
                f"could not read {self.url} ({error}); check the file and its permissions"
            ) from error

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, onto the CPU."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by parameter name, such as `connector.resampler.latents`."""
        names = sorted(name for name in self.names if name.startswith(WEIGHTS))
        return {name.removeprefix(WEIGHTS): self.tensor(name) for name in names}

    def _read_document(self, header: Mapping[str, str]) -> dict[str, Any]:
        text = header.get(_DOCUMENT, "")
        if _hash(text.encode()) != header.get(_DIGEST):
            raise CheckpointError(f"{self.url} is not a checkpoint of vlm_composer, or is damaged")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._malformed(f"its document is not JSON ({error})") from error
        if isinstance(document, dict):
            check_format(document, FORMAT, self.url)
        if fault := document_fault(document):
            raise self._malformed(fault)
        return document

    def _check_tensors(self, file: Any) -> None:
        hashes: dict[str, str] = self.document["hashes"]
        for name in sorted(self.names | hashes.keys()):
            if name not in self.names or hash_tensor(file.get_tensor(name)) != hashes.get(name):
                raise CheckpointError(f"{self.url} is damaged: {name} is not what was saved")
        slices = {name: file.get_slice(name) for name in self.names}
        kinds = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        if fault := tensors_fault(kinds, self.document["world_size"], file.get_tensor):
            raise self._malformed(fault)

    def _malformed(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.url} is malformed: {fault}; use another checkpoint")


def write_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Write a checkpoint; the caller moves it to its final name once this returns.

    Args:
        path: The file.
        tensors: Contiguous CPU tensors.
        document: What JSON can hold.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    hashes = {name: hash_tensor(tensor) for name, tensor in tensors.items()}
    text = json.dumps({**document, "format": FORMAT, "hashes": hashes})
    try:
        save_file(dict(tensors), path, {_DOCUMENT: text, _DIGEST: _hash(text.encode())})
    except SafetensorError as error:  # its only reason here is the disk
        raise OSError(f"could not write {path} ({error}); free some space") from error


def load_connector(model: VisionLanguageModel, checkpoint: CheckpointFile) -> None:
    """Load a checkpoint's connector into a model.

    Raises:
        CheckpointError: The checkpoint is of another connector.
    """
    weights = checkpoint.weights()
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_names(expected, weights, checkpoint.url)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])


def check_format(document: Mapping[str, Any], expected: int, url: str) -> None:
    """Raise CheckpointError unless a document has the format that this version reads."""
    found = document.get("format")
    if type(found) is not int or found != expected:
        raise CheckpointError(f"{url} has format {repr(found)[:80]}; this version reads {expected}")


def check_names(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], url: str) -> None:
    """Raise CheckpointError unless a checkpoint has every trained weight in its shape, and no
    other."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{url} is of another connector: it lacks {len(missing)} of {len(expected)} trained "
            f"weights ({', '.join(missing[:3]) or 'none'}) and holds {len(extra)} others "
            f"({', '.join(extra[:3]) or 'none'})"
        )
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{url} is malformed: {name} holds {tensor.dtype}, expected real numbers"
            )
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{url} is of another connector: {name} has shape {tuple(tensor.shape)}, this "
                f"run's has {tuple(expected[name].shape)}"
            )


def hash_tensor(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's dtype, shape and bytes."""
    plain = tensor.detach().contiguous()
    digest = xxhash.xxh3_128(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)
