"""From the parts to Composer's Trainer."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import torch
from composer import Algorithm, Callback, DataSpec, Evaluator, Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import (
    LRMonitor,
    MemoryMonitor,
    OptimizerMonitor,
    RuntimeEstimator,
    SpeedMonitor,
)

from vlm_composer.config import TrainConfig
from vlm_composer.config.reports import SpeedMonitorConfig
from vlm_composer.config.run import FSDPConfig
from vlm_composer.data.by_index import CaptionsByIndex
from vlm_composer.data.dataset import StreamingCaptions
from vlm_composer.data.encoder import BatchEncoder
from vlm_composer.evaluation.captions_log import CaptionLog
from vlm_composer.evaluation.evidence import Evidence
from vlm_composer.models.composer_model import ComposerVLM
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.training.checkpoint_folder import CheckpointFolder
from vlm_composer.training.checkpointing import Checkpointer
from vlm_composer.training.cut_answers import CutAnswers
from vlm_composer.training.gradient_norm import GradientNorm
from vlm_composer.training.guards import FreezeGuard, NaNGuard, ShortEpochGuard, TowerGuard
from vlm_composer.training.hardware import choose_precision, measure_peak_flops
from vlm_composer.training.logging_setup import build_loggers
from vlm_composer.training.optimization import build_optimizer, build_scheduler
from vlm_composer.training.ownership import ReleaseFolders
from vlm_composer.training.parallelism import (
    FixedBuckets,
    average_gradients,
    choose_units,
    device_mesh,
    fsdp_config,
)
from vlm_composer.training.preemption import GracefulStop
from vlm_composer.training.run_facts import RunFacts
from vlm_composer.training.speed_report import SpeedReport
from vlm_composer.training.step_times import StepTimes
from vlm_composer.training.towers_identity import Identity


def build_trainer(
    config: TrainConfig,
    vlm: VisionLanguageModel,
    train: DataSpec,
    evaluators: list[Evaluator],
    device: str,
    *,
    towers: Identity,
    save_folder: CheckpointFolder | None,
) -> Trainer:
    """Build the Trainer.

    Args:
        config: The run.
        vlm: The model, on the CPU.
        train: Training data.
        evaluators: Evaluation data; may be empty.
        device: "cpu" or "gpu".
        towers: Identity of the frozen towers.
        save_folder: Where checkpoints go, on rank 0.

    Returns:
        A Trainer that is ready for `fit()`, or for `resumption.resume`.

    Raises:
        ValueError: The model cannot be parallelised as asked.
    """
    precision, autocast_dtype = choose_precision(config.precision, device)
    model = ComposerVLM(vlm, cache_prompts=config.cache_prompts, autocast_dtype=autocast_dtype)
    mesh = device_mesh(config, device)
    if mesh is not None:
        choose_units(vlm)
    callbacks = [
        *build_callbacks(config, train, vlm),
        *build_evidence(config, evaluators),
        RunFacts(config, towers, train, evaluators, vlm, sys.argv),
        TowerGuard(towers),
    ]
    if config.save_folder is not None:
        facts = {"towers": towers, "settings": config.recorded()}
        checkpointer = Checkpointer(save_folder, config.save_interval, facts)
        callbacks += [checkpointer, GracefulStop(checkpointer)]
    callbacks.append(ReleaseFolders(config))  # once the last checkpoint is written
    trainer = Trainer(
        model=model,
        optimizers=build_optimizer(model, config.optimizer),
        schedulers=build_scheduler(config.scheduler),
        algorithms=[*build_algorithms(config), FixedBuckets()],
        ddp_sync_strategy="single_auto_sync",  # gradients are sent in a step's last micro-batch
        callbacks=callbacks,
        loggers=build_loggers(config),
        train_dataloader=train,
        eval_dataloader=evaluators or None,
        max_duration=config.max_duration,
        eval_interval=config.eval_interval,
        run_name=config.run_name,
        seed=config.seed,
        device=device,
        precision=precision,
        device_train_microbatch_size=config.device_train_microbatch_size,
        # Weigh micro-batches and ranks by their answer tokens: exact for any way of cutting a
        # batch.
        accumulate_train_batch_on_tokens=True,
        parallelism_config=(
            None if mesh is None else fsdp_config(config.fsdp_config or FSDPConfig(), mesh)
        ),
        progress_bar=config.progress_bar,
        log_to_console=config.log_to_console,
        console_log_interval=config.console_log_interval,
        deterministic_mode=config.deterministic_mode,
        dist_timeout=config.dist_timeout,
    )
    if mesh is not None:
        average_gradients(trainer.state.model, mesh)
    return trainer


def build_algorithms(config: TrainConfig) -> list[Algorithm]:
    """Composer algorithms that the yaml asks for, and what must see the gradients before them."""
    algorithms: list[Algorithm] = []
    if (clipping := config.algorithms.gradient_clipping) is not None:
        algorithms.append(
            GradientClipping(
                clipping_type=clipping.clipping_type, clipping_threshold=clipping.clipping_threshold
            )
        )
    if config.callbacks.warnings is not None:
        algorithms.append(GradientNorm())
    return algorithms


def build_evidence(config: TrainConfig, evaluators: list[Evaluator]) -> list[Callback]:
    """What looks at the evaluation set beside the metrics, where the yaml asks for it."""
    wanted, callbacks = config.callbacks, list[Callback]()
    if not evaluators:
        return callbacks
    loader: Any = evaluators[0].dataloader
    data: CaptionsByIndex = loader.dataloader.dataset
    encoder: BatchEncoder = loader.dataloader.collate_fn
    batch_size = evaluators[0].device_eval_microbatch_size
    assert isinstance(batch_size, int)
    if wanted.evidence is not None:
        callbacks.append(Evidence(data, encoder, batch_size=batch_size, **asdict(wanted.evidence)))
    if wanted.captions is not None:
        folder = config.folder("{run_folder}/captions")
        callbacks.append(
            CaptionLog(data, encoder, folder, batch_size=batch_size, **asdict(wanted.captions))
        )
    return callbacks


def build_callbacks(
    config: TrainConfig, train: DataSpec, vlm: VisionLanguageModel
) -> list[Callback]:
    """Callbacks that the yaml asks for, and those that every run has."""
    wanted = config.callbacks
    callbacks: list[Callback] = [FreezeGuard(), ShortEpochGuard(), CutAnswers()]
    if wanted.nan_guard is not None:
        callbacks.append(NaNGuard())
    if wanted.lr_monitor is not None:
        callbacks.append(LRMonitor())
    if wanted.speed_monitor is not None:
        callbacks.append(_speed_monitor(wanted.speed_monitor, vlm))
    if wanted.memory_monitor is not None:
        callbacks.append(MemoryMonitor())
    if wanted.runtime_estimator is not None:
        callbacks.append(RuntimeEstimator())
    if wanted.optimizer_monitor is not None:
        callbacks.append(
            OptimizerMonitor(batch_log_interval=wanted.optimizer_monitor.batch_log_interval)
        )
    if (times := wanted.step_times) is not None:
        callbacks.append(StepTimes(vlm, **asdict(times)))
    if (report := wanted.speed_report) is not None:
        callbacks.append(
            SpeedReport(
                report.full_epoch_samples or _epoch_size(train),
                warmup_batches=report.warmup_batches,
                interval=report.interval,
            )
        )
    return callbacks


def _epoch_size(train: DataSpec) -> int:
    dataset = getattr(train.dataloader, "dataset", None)
    assert isinstance(dataset, StreamingCaptions)
    return dataset.epoch_size


def _speed_monitor(config: SpeedMonitorConfig, vlm: VisionLanguageModel) -> SpeedMonitor:
    available = config.gpu_flops_available
    if available is None and not torch.cuda.is_available():
        llm_dtype = next(vlm.language_model.parameters()).dtype
        available = measure_peak_flops(llm_dtype)
    return SpeedMonitor(window_size=config.window_size, gpu_flops_available=available)
