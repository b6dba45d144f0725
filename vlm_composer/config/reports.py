"""The sections of a training yaml about what a run tells: callbacks and loggers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SpeedMonitorConfig:
    """Composer's SpeedMonitor: samples/s, tokens/s, FLOP/s and MFU."""

    window_size: int = 20
    """Batches the figures are averaged over."""
    gpu_flops_available: float | None = None
    """Peak FLOP/s of one device, for MFU. Empty: Composer's table of GPUs; a measured matrix
    product on a CPU."""


@dataclass
class SpeedReportConfig:
    """The line with average step time, samples/s and the estimate for a full epoch."""

    warmup_batches: int = 3
    """First batches that are left out."""
    interval: str = "100ba"
    """How often it is logged; it always is at the end."""
    full_epoch_samples: int | None = None
    """Samples of the epoch to estimate for; those of the train set when empty."""


@dataclass
class StepTimesConfig:
    """What a step's time is spent on, as `time/…` and in a log line; more than 5 % of waiting for
    data is warned of."""

    warmup_batches: int = 3
    """First batches that are left out."""
    interval: str = "100ba"
    """Steps that are averaged over, and how often that is logged."""


@dataclass
class NoOptions:
    """A callback without options: write `lr_monitor: {}`."""


@dataclass
class OptimizerMonitorConfig:
    """Composer's OptimizerMonitor: gradient norms, after clipping. Under FSDP2 the norm of each
    parameter is that of a shard; the global one is whole."""

    batch_log_interval: int = 10
    """Batches between two logs."""


@dataclass
class CallbacksConfig:
    """Callbacks; a key with nothing behind it takes the defaults."""

    lr_monitor: NoOptions | None = None
    """Log the learning rate."""
    speed_monitor: SpeedMonitorConfig | None = None
    speed_report: SpeedReportConfig | None = None
    step_times: StepTimesConfig | None = None
    memory_monitor: NoOptions | None = None
    """Log GPU memory."""
    runtime_estimator: NoOptions | None = None
    """Log the time left."""
    optimizer_monitor: OptimizerMonitorConfig | None = None
    nan_guard: NoOptions | None = field(default_factory=NoOptions)
    """End the run at a loss that is not finite, naming the batch and its samples; null for none."""


@dataclass
class WandBConfig:
    """Weights & Biases; offline where no key is found."""

    project: str = "vlm_composer"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class JSONLConfig:
    """Metrics to a local file, one JSON object a line."""

    path: str = "{run_folder}/metrics.jsonl"
    """Where; `{run_folder}` is the run's folder, see `run_folder`."""


@dataclass
class LoggersConfig:
    """Where metrics go, besides console and progress bar."""

    wandb: WandBConfig | None = None
    jsonl: JSONLConfig | None = None
