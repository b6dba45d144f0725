"""The schema of a training yaml: one dataclass a section, one docstring a key.

Types, defaults and constraints stand beside the keys and nowhere else. Names are those of Composer
and LLM Foundry.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm_composer.config.data import EvalLoaderConfig, ImageDecoder, LoaderConfig
from vlm_composer.config.model import ConnectorConfig, LanguageModelConfig, VisionTowerConfig
from vlm_composer.config.reports import CallbacksConfig, LoggersConfig
from vlm_composer.config.section import POSITIVE, SHARE, Bounds, Name, Section, at_least
from vlm_composer.config.times import RUN_LENGTH, WARMUP, ConsoleInterval, Interval

BETAS = Bounds(
    "each at least 0 and less than 1",
    "are not both in [0, 1)",
    lambda betas: all(0 <= beta < 1 for beta in betas),
)


@dataclass
class OptimizerConfig(Section):
    """AdamW over the connector; fused where the device has it."""

    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate."""
    betas: Annotated[tuple[float, float], Field(strict=False), BETAS] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decoupled weight decay."""


@dataclass
class SchedulerConfig(Section):
    """Learning rate over time."""

    name: Literal["cosine_with_warmup", "linear_decay_with_warmup", "constant_with_warmup"] = (
        "cosine_with_warmup"
    )
    """Shape of the schedule after the warm-up."""
    t_warmup: Annotated[str, WARMUP] = "0.03dur"
    """Linear warm-up: a share of the run such as 0.03dur, or a time such as 100ba, in the unit of
    `max_duration` (ep and ba go together)."""
    alpha_f: Annotated[float, SHARE] = 0.0
    """Final learning rate as a multiple of the peak."""


@dataclass
class GradientClippingConfig(Section):
    """Composer's GradientClipping."""

    clipping_type: Literal["norm", "value", "adaptive"] = "norm"
    """norm: the norm of all gradients together. value: each element. adaptive: each parameter's
    gradient by the norm of its weights."""
    clipping_threshold: float = 1.0
    """Largest norm or value; with adaptive, largest ratio of the two norms."""


@dataclass
class AlgorithmsConfig(Section):
    """Composer algorithms."""

    gradient_clipping: GradientClippingConfig | None = None
    """Clip gradients before each optimizer step; none are clipped when empty."""


@dataclass
class FSDPConfig(Section):
    """Composer's FSDP2 settings, for `parallelism: shard`, `hybrid` and, where one of them is
    chosen, `auto`."""

    reshard_after_forward: bool = True
    """Free gathered weights after the forward and gather them again for the backward."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward instead of keeping its activations."""
    data_parallel_shard_degree: int | None = None
    """Ranks that share a copy of the model with `hybrid`; the ranks of a node when empty."""
    verbose: bool = False
    """Log how Composer wraps the model."""


Parallelism = Literal["replicate", "shard", "hybrid", "auto"]


@dataclass
class RunSettings(Section):
    """A training run."""

    vision_tower: VisionTowerConfig
    """The frozen vision tower."""
    language_model: LanguageModelConfig
    """The frozen language model."""
    train_loader: LoaderConfig
    """The loader of the training data."""
    global_train_batch_size: Annotated[int, at_least(1)]
    """Samples an optimizer step sees, over all ranks and micro-batches."""
    max_duration: Annotated[str, RUN_LENGTH]
    """Length of the run, in whole ep (epochs), ba (batches), sp (samples) or tok (tokens)."""

    variables: dict[Name, Any] = field(default_factory=dict)
    """Values of your own for `${variables.…}` elsewhere in the file."""
    run_name: str = "stage1"
    """Names folders, checkpoints and the W&B run."""
    run_folder: str = "runs/{run_name}"
    """Folder for what the run writes locally; `{run_name}` is filled in."""
    seed: int = 17
    """Seed of the connector's initial weights."""
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    """The trained connector."""
    max_seq_len: int = 2048
    """Longest sample in tokens, image tokens included; longer answers are cut and counted. At most
    the language model's positions, and more than any prompt of the data has with its image."""
    add_bos: bool | None = None
    """Begin samples with a start token; the tokenizer's own habit when empty."""

    image_decoder: ImageDecoder = "torchvision"
    """Who decodes and scales images. torchvision: more than twice as fast, within 2 of 255 grey
    levels of Hugging Face's processors. pil: exactly their pixels. With features: what they were
    made with."""

    device: Literal["cpu", "gpu"] | None = None
    """Device to train on; the GPU where there is one, when empty."""
    precision: Literal["fp32", "amp_bf16", "auto"] = "amp_bf16"
    """Arithmetic of the connector; frozen towers compute in the dtype they are stored in. auto:
    amp_bf16 where the device multiplies bf16 in hardware, else fp32."""
    cache_prompts: bool = False
    """Read the prompt text before an image once and keep its keys and values: for data with few
    different prompts, such as LLaVA-Pretrain. Only with `parallelism: replicate`."""
    compile_blocks: bool | Literal["auto"] = "auto"
    """Compile the language model's norms, rotary embeddings and feed-forwards: faster steps with
    the same gradients, for up to a minute at a machine's first start. auto: where torch finds a
    compiler."""
    device_train_microbatch_size: Annotated[int | Literal["auto"], at_least(1)] = "auto"
    """Samples a forward pass sees on one rank; auto (GPU) halves it until it fits."""
    parallelism: Parallelism = "replicate"
    """replicate: DDP, a copy of the towers on every rank. shard: FSDP2 over all ranks. hybrid:
    FSDP2 within a node, a copy on every node. auto: the first of replicate, hybrid and shard that
    fits into the devices' memory by the plan."""
    fsdp_config: FSDPConfig | None = None
    """FSDP2 settings; their defaults when empty."""

    eval_loader: EvalLoaderConfig | None = None
    """The loader of the evaluation data; nothing is evaluated when empty."""
    eval_interval: Interval = "1ep"
    """How often the evaluation set is run (1ep, 500ba, 0.1dur, 1h30m, …); it always is at the
    end."""
    eval_first: bool = False
    """Evaluate before the first step as well."""
    eval_subset_num_batches: Annotated[int, at_least(-1)] = -1
    """Batches of an evaluation; -1 for all."""
    device_eval_batch_size: Annotated[int, at_least(1)] | None = None
    """Samples a forward pass of the evaluation sees on one rank; the micro-batch size when
    empty."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the connector's weights are updated."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """Learning rate over time."""
    algorithms: AlgorithmsConfig = field(default_factory=AlgorithmsConfig)
    """Composer algorithms."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """What is measured, logged and watched during the run."""
    loggers: LoggersConfig = field(default_factory=LoggersConfig)
    """Where metrics go, besides console and progress bar."""

    save_folder: str | None = None
    """Folder or URL (s3://, gs://, azure://) of the checkpoints; `{run_name}` and `{run_folder}`
    are filled in. No checkpoint is written when empty."""
    save_interval: Interval = "1ep"
    """How often a checkpoint is saved; one always is at the end and at SIGTERM."""
    save_num_checkpoints_to_keep: Annotated[int, at_least(-1)] = -1
    """Newest checkpoints to keep, of those that this run saved or resumed from, in a folder or a
    bucket; what is older is deleted. -1 keeps all."""
    save_overwrite: bool = False
    """Delete the checkpoints of an earlier run in `save_folder` first."""
    autoresume: bool = False
    """Resume from the newest complete checkpoint in `save_folder` where there is one."""
    load_path: str | None = None
    """Checkpoint to start from, or a folder or URL with checkpoints, for the newest of them, or
    with what `python -m vlm_composer.export` wrote (with `load_weights_only`)."""
    load_weights_only: bool = False
    """Take the connector's weights from `load_path` and nothing else."""
    store_timeout: Annotated[float, at_least(0)] = 300
    """Seconds that an object store may be unavailable, when a run starts, reads shards or saves,
    before it ends."""

    progress_bar: bool = True
    """Show a progress bar, for a terminal."""
    log_to_console: bool = True
    """Write metrics to the console as text."""
    console_log_interval: ConsoleInterval = "10ba"
    """How often `log_to_console` writes, in ep or ba."""
    deterministic_mode: bool = False
    """Use torch's deterministic algorithms, which are slower."""
    dist_timeout: float = 600
    """Seconds that a collective operation may take."""

    @property
    def loaders(self) -> dict[str, LoaderConfig]:
        """The loaders by side: `train` and, where there is one, `eval`."""
        sides = {"train": self.train_loader, "eval": self.eval_loader}
        return {side: loader for side, loader in sides.items() if loader is not None}

    @property
    def shard_degree(self) -> int | None:
        """`fsdp_config.data_parallel_shard_degree`; None where it is empty."""
        return self.fsdp_config.data_parallel_shard_degree if self.fsdp_config else None

    def folder(self, text: str) -> str:
        """Fill `{run_folder}` and `{run_name}` into a path."""
        run_folder = self.run_folder.replace("{run_name}", self.run_name)
        return text.replace("{run_folder}", run_folder).replace("{run_name}", self.run_name)
