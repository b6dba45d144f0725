"""Whether both trainers compute the same gradients, before anyone asks how fast."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor

from benchmarks.contenders import start_from
from benchmarks.faithful_towers import DTYPE, Shape, read_yaml, training_yaml
from benchmarks.hf_baseline import NormalisedPairs, build_llava, collate, read_template
from vlm_composer.train import prepare

FP32_DISTANCE = 1e-5
"""Farthest that fp32 gradients may be from the reference."""
BF16_FACTOR = 1.2
"""Farthest that our bf16 gradients may be from it, as a multiple of Hugging Face's distance."""

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Distances:
    """Relative norms of differences from Hugging Face's fp32 gradient with eager attention."""

    ours_fp32: float
    ours_bf16: float | None = None
    """None, as the next, where the machine has no bf16."""
    hf_bf16: float | None = None

    def faults(self) -> list[str]:
        """What is farther off than it may be."""
        faults = []
        if not self.ours_fp32 <= FP32_DISTANCE:
            faults.append(f"fp32 gradients are {self.ours_fp32:.1e} apart, more than 1e-5")
        if self.ours_bf16 is None or self.hf_bf16 is None:
            return faults
        if not self.ours_bf16 <= BF16_FACTOR * self.hf_bf16:
            faults.append(
                f"bf16 gradients are {self.ours_bf16:.2e} from fp32, more than {BF16_FACTOR} × "
                f"Hugging Face's {self.hf_bf16:.2e}"
            )
        return faults


def compare_gradients(
    connection: Connection, shape: Shape, towers: Path, data: Path, out: Path, size: int
) -> None:
    """Send the `Distances` of the connector's gradients of one micro-batch of `size` samples."""
    reference = _hf_gradients(shape, towers, data, size, torch.float32, "eager")
    fp32 = training_yaml(shape, towers, data, out / "fp32.yaml", size, dtype="fp32")
    ours_fp32 = _distance(_our_gradients(fp32, towers), reference)
    if DTYPE == "fp32":
        connection.send(Distances(ours_fp32))
        return
    bf16 = training_yaml(shape, towers, data, out / "bf16.yaml", size)
    ours_bf16 = _distance(_our_gradients(bf16, towers), reference)
    hf_bf16 = _hf_gradients(shape, towers, data, size, torch.bfloat16, "sdpa")
    connection.send(Distances(ours_fp32, ours_bf16, _distance(hf_bf16, reference)))


def _hf_gradients(
    shape: Shape, towers: Path, data: Path, size: int, dtype: torch.dtype, attention: str
) -> Gradients:
    template = read_template(shape, towers)
    llava = build_llava(
        shape, towers, template.image_token_id, dtype=dtype, attn_implementation=attention
    )
    pairs = NormalisedPairs(data, template, shape.image_size)
    batch = collate([pairs[index] for index in range(size)])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = llava(**batch).loss
    loss.backward()
    return _of(llava.model.multi_modal_projector)


class _TakeGradients(Callback):
    """Keeps the connector's gradients of the first step, before they are clipped."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def after_backward(self, state: State, logger: Logger) -> None:
        model: Any = getattr(state.model, "module", state.model)
        self.gradients = _of(model.model.connector)


def _our_gradients(path: Path, towers: Path) -> Gradients:
    config = read_yaml(path)
    config.max_duration = "1ba"
    trainer = prepare(config)
    start_from(trainer, towers)
    taken = _TakeGradients()
    trainer.state.callbacks.append(taken)
    trainer.fit()
    trainer.close()
    return taken.gradients


def _of(connector: torch.nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in connector.named_parameters() if p.grad is not None}


def _distance(found: Gradients, reference: Gradients) -> float:
    assert found.keys() == reference.keys(), "other parameters were trained"
    ours, theirs = (
        torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])
        for gradients in (found, reference)
    )
    return float((ours - theirs).norm() / theirs.norm())
