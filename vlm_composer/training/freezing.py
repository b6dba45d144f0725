"""Say what is trained and what is not."""

from __future__ import annotations

import logging

from torch import nn

from vlm_composer.models.vlm import VisionLanguageModel

log = logging.getLogger(__name__)


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def parts(model: VisionLanguageModel) -> dict[str, nn.Module]:
    """The parts that the log and the plan speak of, in the order of the data's way."""
    named: dict[str, nn.Module] = {"vision_tower": model.vision_tower}
    if model.connector.vision_ln is not None:
        named["vision_ln"] = model.connector.vision_ln
    return named | {
        "resampler": model.connector.resampler,
        "projector": model.connector.projector,
        "llm": model.language_model,
    }


def log_parts(model: VisionLanguageModel) -> None:
    """Log every part: trained or frozen, parameters, dtype."""
    for name, module in parts(model).items():
        trained = any(p.requires_grad for p in module.parameters())
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
        log.info(
            "%-12s %-7s %15s parameters, %s",
            name,
            "trained" if trained else "frozen",
            f"{count_parameters(module):,}",
            " and ".join(dtypes),
        )
