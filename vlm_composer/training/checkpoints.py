"""Read the connector out of a checkpoint, without running what the file says."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_composer.models.vlm import VisionLanguageModel

HONEST_GLOBALS: list[Any] = [
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.ndarray((0,)).__reduce__()[0],  # numpy._core.multiarray._reconstruct
    np.dtype,
    type(np.dtype("uint32")),
]
"""Classes that Composer's own checkpoints hold beside tensors; nothing else is unpickled."""

PREFIX = "model.connector."
"""How the connector's parameters are named in a checkpoint."""


def read_connector(path: str | Path) -> dict[str, Tensor]:
    """Read the connector's weights from a checkpoint of this project.

    Args:
        path: A file that the Trainer saved.

    Returns:
        The connector's state dict, on the CPU.

    Raises:
        ValueError: The file holds other objects than such a checkpoint, or no connector.
    """
    try:
        with torch.serialization.safe_globals(HONEST_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = checkpoint["state"]["model"]
    except (
        Exception
    ) as error:  # torch raises pickle errors, RuntimeError and KeyError for a bad file
        raise ValueError(f"{path} is not a checkpoint of a connector: {error}") from error
    connector = {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
    if len(connector) != len(weights) or not connector:
        raise ValueError(
            f"{path} holds {len(connector)} parameters of a connector and "
            f"{len(weights) - len(connector)} others; expected a connector alone"
        )
    return connector


def load_connector(model: VisionLanguageModel, path: str | Path) -> None:
    """Load a checkpoint's connector into a model; every parameter must be there and no other.

    Raises:
        ValueError: The file is not such a checkpoint.
        RuntimeError: It is that of a connector of another shape.
    """
    model.connector.load_state_dict(read_connector(path), strict=True)
