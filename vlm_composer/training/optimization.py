"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import torch
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)
from torch import nn

from vlm_composer.config.run import OptimizerConfig, SchedulerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, in torch's fused implementation."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,  # torch 2.7 has it for CPU and CUDA
    )


def build_scheduler(config: SchedulerConfig) -> ComposerScheduler:
    """Composer's scheduler of that name."""
    if config.name == "cosine_with_warmup":
        return CosineAnnealingWithWarmupScheduler(t_warmup=config.t_warmup, alpha_f=config.alpha_f)
    if config.name == "linear_decay_with_warmup":
        return LinearWithWarmupScheduler(t_warmup=config.t_warmup, alpha_f=config.alpha_f)
    return ConstantWithWarmupScheduler(t_warmup=config.t_warmup)
