"""The sections of a training yaml about what a run reports: callbacks and loggers."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic.dataclasses import dataclass

from vlm_composer.config.section import SHARE, Section, at_least
from vlm_composer.config.times import Interval


@dataclass
class SpeedMonitorConfig(Section):
    """Composer's SpeedMonitor: samples/s, tokens/s, FLOP/s and MFU."""

    window_size: int = 20
    """Batches the figures are averaged over."""
    gpu_flops_available: float | None = None
    """Peak FLOP/s of one device, for MFU. Empty: Composer's table of GPUs; a measured matrix
    product on a CPU."""


@dataclass
class SpeedReportConfig(Section):
    """The line with average step time, samples/s and the estimate for a full epoch."""

    warmup_batches: int = 3
    """First batches that are left out."""
    interval: Interval = "100ba"
    """How often it is logged; it always is at the end."""
    full_epoch_samples: int | None = None
    """Samples of the epoch to estimate for; those of the train set when empty."""


@dataclass
class StepTimesConfig(Section):
    """What a step's time is spent on, as `time/…` and in a log line."""

    warmup_batches: int = 3
    """First batches that are left out."""
    interval: Interval = "100ba"
    """Steps that are averaged over, and how often that is logged."""


@dataclass
class NoOptions(Section):
    """A callback without options: write `lr_monitor: {}`."""


@dataclass
class OptimizerMonitorConfig(Section):
    """Composer's OptimizerMonitor: gradient norms, after clipping. Under FSDP2 the norm of each
    parameter is that of a shard; the global one is whole."""

    batch_log_interval: int = 10
    """Batches between two logs."""


@dataclass
class EvidenceConfig(Section):
    """Whether the language model sees, at each evaluation, as `evidence/…`: the loss with the right
    image, with another sample's and with a blank one, retrieval, and what leaves the connector."""

    num_samples: Annotated[int, at_least(2)] = 64
    """Samples of the evaluation set, chosen evenly over it; always the same."""
    num_choices: Annotated[int, at_least(2)] = 8
    """Captions of which the right one is to be found. The language model reads `num_samples` ×
    (`num_choices` + 2) samples an evaluation, in batches of `device_eval_batch_size`."""


@dataclass
class CaptionLogConfig(Section):
    """Captions of the same held-out images at each evaluation, as files in the run's folder and as
    a W&B table."""

    num_images: Annotated[int, at_least(1)] = 8
    """Images of the evaluation set, chosen evenly over it; always the same."""
    max_new_tokens: Annotated[int, at_least(1)] = 32
    """Longest caption in tokens."""


@dataclass
class LiveWarningsConfig(Section):
    """Warnings with what to do, in the log, as `warnings/…` and in `warnings.jsonl` of the run's
    folder. Those about the gap and the connector need `evidence`, that about data `step_times`."""

    gap_after: Annotated[float, SHARE] = 0.5
    """Share of the run after which the gap must be open and latents alive."""
    min_gap: float = 0.05
    """Nats an answer token by which the right image must beat another's."""
    loss_factor: Annotated[float, at_least(1)] = 2.0
    """Multiple of the running median above which a loss is a spike."""
    gradient_factor: Annotated[float, at_least(1)] = 10.0
    """Multiple of the running median above which a gradient norm, before clipping, explodes; it is
    said at the third time within `window` batches."""
    min_output_spread: Annotated[float, at_least(0)] = 0.01
    """Least `evidence/output_spread`."""
    max_dead_latents: Annotated[float, SHARE] = 0.25
    """Share of the latents that may give the same for every image."""
    max_data_wait: Annotated[float, SHARE] = 0.05
    """Share of a step that may be waiting for data."""
    window: Annotated[int, at_least(2)] = 50
    """Batches of a running median."""
    cooldown: Annotated[int, at_least(1)] = 200
    """Batches for which the same warning is not repeated."""


@dataclass
class CallbacksConfig(Section):
    """Callbacks: `{}` takes the defaults, null turns one off."""

    lr_monitor: NoOptions | None = None
    """Log the learning rate."""
    speed_monitor: SpeedMonitorConfig | None = None
    """Log samples/s, tokens/s, FLOP/s and MFU."""
    speed_report: SpeedReportConfig | None = None
    """Log the average step time, samples/s and the estimate for a full epoch."""
    step_times: StepTimesConfig | None = None
    """Log what a step's time is spent on."""
    memory_monitor: NoOptions | None = None
    """Log GPU memory."""
    runtime_estimator: NoOptions | None = None
    """Log the time left."""
    optimizer_monitor: OptimizerMonitorConfig | None = None
    """Log gradient norms."""
    evidence: EvidenceConfig | None = None
    """Measure at each evaluation what the images are worth to the language model."""
    captions: CaptionLogConfig | None = None
    """Write captions of held-out images at each evaluation."""
    warnings: LiveWarningsConfig | None = field(default_factory=LiveWarningsConfig)
    """Warn about a run that goes wrong, with what to do; null for no warnings."""
    nan_guard: NoOptions | None = field(default_factory=NoOptions)
    """End the run at a loss that is not finite, naming the batch and its samples; null for no
    check."""


@dataclass
class WandBConfig(Section):
    """Weights & Biases; offline where no key is found."""

    project: str = "vlm_composer"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; the account's own when empty."""
    group: str | None = None
    """W&B group that the run is shown in."""
    tags: list[str] = field(default_factory=list)
    """W&B tags of the run."""


@dataclass
class JSONLConfig(Section):
    """Metrics to a local file, one JSON object a line."""

    path: str = "{run_folder}/metrics.jsonl"
    """File for the metrics; `{run_folder}` and `{run_name}` are filled in."""


@dataclass
class LoggersConfig(Section):
    """Where metrics go, besides console and progress bar."""

    wandb: WandBConfig | None = None
    """Log to Weights & Biases."""
    jsonl: JSONLConfig | None = None
    """Write metrics to a local file, which the report needs."""
