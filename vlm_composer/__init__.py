"""Stage-1 connector training for vision-language models, on Composer and StreamingDataset.

The names below are the library's public surface. They are loaded when they are first asked for, so
that `import vlm_composer` costs nothing:

    load_export         a folder that was exported → model, processor
    caption_images      model, processor, pictures → captions
    export_checkpoint   a checkpoint → a folder that transformers loads
    TrainConfig         the schema of a training yaml; `TrainConfig.read(path)`
    ConfigError         what `TrainConfig.read` raises, with every mistake of the yaml
    CheckpointError     a checkpoint or an export that is damaged or does not fit
    read_metrics        a run's metrics.jsonl → name → [(batch, value)]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_composer.config import TrainConfig
    from vlm_composer.config.loader import ConfigError
    from vlm_composer.export.exporting import export_checkpoint
    from vlm_composer.export.loading import caption_images, load_export
    from vlm_composer.training.checkpoint_file import CheckpointError
    from vlm_composer.training.metrics_file import read_metrics

_WHERE = {
    "load_export": "vlm_composer.export.loading",
    "caption_images": "vlm_composer.export.loading",
    "export_checkpoint": "vlm_composer.export.exporting",
    "TrainConfig": "vlm_composer.config",
    "ConfigError": "vlm_composer.config.loader",
    "CheckpointError": "vlm_composer.training.checkpoint_file",
    "read_metrics": "vlm_composer.training.metrics_file",
}
__all__ = [
    "CheckpointError",
    "ConfigError",
    "TrainConfig",
    "caption_images",
    "export_checkpoint",
    "load_export",
    "read_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
