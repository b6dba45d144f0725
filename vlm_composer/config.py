"""The schema of a training yaml: one dataclass a section, one docstring a key.

`TrainConfig.read` reads a file with its overrides, checks every key, type and combination before
anything is loaded, and reports all mistakes at once. Names are those of Composer and LLM Foundry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm_composer.config_loader import ConfigError, build, read_yaml

Dtype = Literal["bf16", "fp32", "auto"]
ImageDecoder = Literal["torchvision", "pil"]


@dataclass
class TowerConfig:
    """What both towers have in common."""

    name: str
    """Hub id or folder of a Hugging Face model."""
    pretrained: bool = True
    """Read its weights; false builds random ones from its configuration."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Dtype = "bf16"
    """Storage of the frozen weights. auto: bf16 where the device multiplies it in hardware, else
    fp32."""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """Attributes of its configuration to change; only with `pretrained: false`."""


@dataclass
class VisionTowerConfig(TowerConfig):
    """The frozen vision tower."""

    layer: int = -1
    """Whose output to use: -1 the last hidden state after the final norm; others as in LLaVA's
    `vision_feature_layer`, before that norm; layers above it are removed."""
    attn_implementation: str = "sdpa"
    """transformers' name of the attention function."""
    fuse_gelu: bool | Literal["auto"] = "auto"
    """Let oneDNN compute a linear layer and its GELU in one, with a copy of the layer's weights.
    Only on a CPU, where auto does so; not with `parallelism: shard`."""
    image_size: int | None = None
    """Side of the square image in pixels; the model's own when empty."""


@dataclass
class LanguageModelConfig(TowerConfig):
    """The frozen language model."""

    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; the model's own when empty."""


@dataclass
class ResamplerConfig:
    """Perceiver resampler: patches to a fixed number of tokens."""

    num_latents: int = 64
    """Tokens an image becomes."""
    depth: int = 2
    """Layers."""
    num_heads: int = 8
    """Attention heads a layer."""
    head_dim: int = 64
    """Width of a head; the latents are `num_heads * head_dim` wide."""


@dataclass
class ProjectorConfig:
    """MLP projector: from the latents to the language model."""

    mlp_ratio: int = 4
    """Hidden width as a multiple of the language model's width."""


@dataclass
class ConnectorConfig:
    """The trainable part."""

    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    vision_ln: bool = False
    """A trainable LayerNorm on the vision tower's output."""


@dataclass
class DatasetConfig:
    """Where MDS shards are and how StreamingDataset reads them. They are of images
    (`python -m convert`) or of what the vision tower makes of them (`python -m convert.features`);
    the shards say which."""

    local: str
    """Folder the shards are read from; with `remote`, the cache they are downloaded to."""
    remote: str | None = None
    """Folder or URL (s3://, gs://, azure://) that the shards are downloaded from."""
    shuffle: bool = False
    """Shuffle the samples anew in every epoch."""
    shuffle_algo: str = "py1e"
    """StreamingDataset's shuffling algorithm."""
    shuffle_seed: int = 17
    """Seed of the shuffle."""
    shuffle_block_size: int | None = None
    """Samples shuffled together; StreamingDataset's own choice when empty."""
    num_canonical_nodes: int = 1
    """Parts the samples are divided into before shuffling. 1: no sample is ever repeated and the
    order is the same for any number of nodes, but every node downloads every shard. A multiple of
    the
    nodes: each downloads its part, and up to that many samples repeat an epoch."""
    predownload: int | None = None
    """Samples to download ahead of a worker."""
    cache_limit: str | int | None = None
    """Most bytes the cache may hold, for example 100gb."""
    download_timeout: float = 600
    """Seconds that the other ranks of a node wait for the index."""
    validate_hash: str | None = "xxh64"
    """Hash that every shard is checked with before it is read, downloaded or not; empty checks
    sizes only."""


@dataclass
class LoaderConfig:
    """A data loader."""

    dataset: DatasetConfig
    num_workers: int = 2
    """Processes a rank that read, decode and tokenize."""
    prefetch_factor: int = 2
    """Batches each of them prepares ahead."""
    drop_last: bool = True
    """Leave out the last batch of an epoch where it is not full (training)."""


@dataclass
class EvalLoaderConfig(LoaderConfig):
    """The loader of the evaluation set."""

    drop_last: bool = False
    """Must stay false: every sample counts once."""
    mismatched_images: bool = False
    """Also evaluate with the image of the sample half the set away in place of the right one, as
    `metrics/eval_mismatched/…`. The difference is what the language model takes from the image."""


@dataclass
class OptimizerConfig:
    """AdamW over the connector; fused where the device has it."""

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class SchedulerConfig:
    """Learning rate over time."""

    name: Literal["cosine_with_warmup", "linear_decay_with_warmup", "constant_with_warmup"] = (
        "cosine_with_warmup"
    )
    t_warmup: str = "0.03dur"
    """Linear warm-up: a time such as 100ba, or a share of the run such as 0.03dur."""
    alpha_f: float = 0.0
    """Final learning rate as a multiple of the peak."""


@dataclass
class GradientClippingConfig:
    """Composer's GradientClipping."""

    clipping_type: Literal["norm", "value", "adaptive"] = "norm"
    clipping_threshold: float = 1.0


@dataclass
class AlgorithmsConfig:
    """Composer algorithms."""

    gradient_clipping: GradientClippingConfig | None = None


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


@dataclass
class FSDPConfig:
    """Composer's FSDP2 settings, for `parallelism: shard`."""

    reshard_after_forward: bool = True
    """Free gathered weights after the forward and gather them again for the backward."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward instead of keeping its activations."""
    verbose: bool = False


@dataclass
class TrainConfig:
    """A training run."""

    vision_tower: VisionTowerConfig
    language_model: LanguageModelConfig
    train_loader: LoaderConfig
    global_train_batch_size: int
    """Samples an optimizer step sees, over all ranks and micro-batches."""
    max_duration: str
    """Length of the run: 1ep, 500ba, …"""

    variables: dict[str, Any] = field(default_factory=dict)
    """Values of your own for `${variables.…}` elsewhere in the file."""
    run_name: str = "stage1"
    run_folder: str = "runs/{run_name}"
    """Folder for what the run writes locally."""
    seed: int = 17
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    max_seq_len: int = 2048
    """Longest sample in tokens, image tokens included; longer answers are cut and counted."""
    add_bos: bool | None = None
    """Begin samples with a start token; the tokenizer's own habit when empty."""

    image_decoder: ImageDecoder = "torchvision"
    """Who decodes and scales images. torchvision: more than twice as fast, within 2 of 255 grey
    levels of Hugging Face's processors. pil: exactly their pixels. With features: what they were
    made with."""

    device: Literal["cpu", "gpu"] | None = None
    """The GPU where there is one, when empty."""
    precision: Literal["fp32", "amp_bf16", "auto"] = "amp_bf16"
    """Arithmetic of the connector; frozen towers compute in the dtype they are stored in. auto:
    amp_bf16 where the device multiplies bf16 in hardware, else fp32."""
    cache_prompts: bool = False
    """Read the prompt text before an image once and keep its keys and values: for data with few
    different prompts, such as LLaVA-Pretrain. Not with `parallelism: shard`."""
    compile_blocks: bool | Literal["auto"] = "auto"
    """Compile the language model's norms, rotary embeddings and feed-forwards: faster steps with
    the same gradients, for up to a minute at a machine's first start. auto: where torch finds a
    compiler."""
    device_train_microbatch_size: int | Literal["auto"] = "auto"
    """Samples a forward pass sees on one rank; auto (GPU) halves it until it fits."""
    parallelism: Literal["replicate", "shard"] = "replicate"
    """replicate: DDP, a copy of the towers on every rank. shard: FSDP2 over all ranks."""
    fsdp_config: FSDPConfig | None = None

    eval_loader: EvalLoaderConfig | None = None
    eval_interval: str = "1ep"
    """How often the evaluation set is run; it always is at the end."""
    eval_first: bool = False
    """Evaluate before the first step as well."""
    eval_subset_num_batches: int = -1
    """Batches of an evaluation; -1 for all."""
    device_eval_batch_size: int | None = None
    """Samples a forward pass of the evaluation sees on one rank; the micro-batch size when
    empty."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    algorithms: AlgorithmsConfig = field(default_factory=AlgorithmsConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)

    save_folder: str | None = None
    """Folder or URL (s3://, gs://, azure://) of the checkpoints; `{run_name}` is filled in. None is
    written when empty."""
    save_interval: str = "1ep"
    """How often a checkpoint is saved; one always is at the end and at SIGTERM."""
    save_num_checkpoints_to_keep: int = -1
    """Newest checkpoints to keep, in a folder or a bucket; -1 keeps all."""
    save_overwrite: bool = False
    """Delete the checkpoints of an earlier run in `save_folder` first."""
    autoresume: bool = False
    """Go on from the newest whole checkpoint in `save_folder` where there is one."""
    load_path: str | None = None
    """Checkpoint to start from, or a folder or URL with checkpoints, for the newest of them."""
    load_weights_only: bool = False
    """Take the connector's weights from `load_path` and nothing else."""
    store_timeout: float = 300
    """Seconds that an object store may be away, while shards are read or checkpoints saved, before
    the run ends."""

    progress_bar: bool = True
    log_to_console: bool = True
    console_log_interval: str = "10ba"
    deterministic_mode: bool = False
    """torch's deterministic algorithms; slower."""
    dist_timeout: float = 600
    """Seconds that a collective operation may take."""

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read and check a yaml file.

        Args:
            path: The file.
            overrides: `key.sub=value` items.

        Returns:
            The configuration.

        Raises:
            ConfigError: With every mistake that was found.
        """
        from vlm_composer.config_checks import mistakes  # it needs this module's types

        errors: list[str] = []
        config = build(cls, read_yaml(path, overrides), "", errors)
        if config is not None:
            errors += mistakes(config)
        if errors or config is None:
            raise ConfigError(str(path), errors)
        return config

    def folder(self, text: str) -> str:
        """Fill `{run_folder}` and `{run_name}` into a path."""
        run_folder = self.run_folder.replace("{run_name}", self.run_name)
        return text.replace("{run_folder}", run_folder).replace("{run_name}", self.run_name)
