"""The schema of a training yaml: one dataclass a section, one docstring a key.

`TrainConfig.read` reads a file with its overrides, checks every key, type and combination before
anything is loaded, and reports all mistakes at once. Names are those of Composer and LLM Foundry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm_composer.config.data import EvalLoaderConfig, ImageDecoder, LoaderConfig
from vlm_composer.config.loader import INTERNAL, ConfigError, Texts, build, read_yaml
from vlm_composer.config.model import ConnectorConfig, LanguageModelConfig, VisionTowerConfig
from vlm_composer.config.reports import CallbacksConfig, LoggersConfig
from vlm_composer.config.times import ConsoleInterval, Interval, RunLength, Warmup


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
    t_warmup: Warmup = "0.03dur"
    """Linear warm-up: a share of the run such as 0.03dur, or a time such as 100ba, in the unit of
    `max_duration` (ep and ba go together)."""
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
class FSDPConfig:
    """Composer's FSDP2 settings, for `parallelism: shard`, `hybrid` and, where one of them is
    chosen, `auto`."""

    reshard_after_forward: bool = True
    """Free gathered weights after the forward and gather them again for the backward."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward instead of keeping its activations."""
    data_parallel_shard_degree: int | None = None
    """Ranks that share a copy of the model with `hybrid`; the ranks of a node when empty."""
    verbose: bool = False


_SECRET_CHARACTERS = 4
"""Of a value from the environment that no message shows; shorter ones stand in any text."""

Parallelism = Literal["replicate", "shard", "hybrid", "auto"]


@dataclass
class TrainConfig:
    """A training run."""

    vision_tower: VisionTowerConfig
    language_model: LanguageModelConfig
    train_loader: LoaderConfig
    global_train_batch_size: int
    """Samples an optimizer step sees, over all ranks and micro-batches."""
    max_duration: RunLength
    """Length of the run, in whole ep, ba, sp or tok: 1ep, 500ba, …"""

    variables: dict[str, Any] = field(default_factory=dict)
    """Values of your own for `${variables.…}` elsewhere in the file."""
    run_name: str = "stage1"
    run_folder: str = "runs/{run_name}"
    """Folder for what the run writes locally."""
    seed: int = 17
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
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
    """The GPU where there is one, when empty."""
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
    device_train_microbatch_size: int | Literal["auto"] = "auto"
    """Samples a forward pass sees on one rank; auto (GPU) halves it until it fits."""
    parallelism: Parallelism = "replicate"
    """replicate: DDP, a copy of the towers on every rank. shard: FSDP2 over all ranks. hybrid:
    FSDP2 within a node, a copy on every node. auto: the first of replicate, hybrid and shard that
    fits into the devices' memory by the plan."""
    fsdp_config: FSDPConfig | None = None

    eval_loader: EvalLoaderConfig | None = None
    eval_interval: Interval = "1ep"
    """How often the evaluation set is run (1ep, 500ba, 0.1dur, 1h30m, …); it always is at the
    end."""
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
    save_interval: Interval = "1ep"
    """How often a checkpoint is saved; one always is at the end and at SIGTERM."""
    save_num_checkpoints_to_keep: int = -1
    """Newest checkpoints to keep, of those that this run saved or resumed from, in a folder or a
    bucket; what is older is deleted. -1 keeps all."""
    save_overwrite: bool = False
    """Delete the checkpoints of an earlier run in `save_folder` first."""
    autoresume: bool = False
    """Go on from the newest whole checkpoint in `save_folder` where there is one."""
    load_path: str | None = None
    """Checkpoint to start from, or a folder or URL with checkpoints, for the newest of them, or
    with what `python -m vlm_composer.export` wrote (with `load_weights_only`)."""
    load_weights_only: bool = False
    """Take the connector's weights from `load_path` and nothing else."""
    store_timeout: float = 300
    """Seconds that an object store may be unavailable, when a run starts, reads shards or saves,
    before it ends."""

    progress_bar: bool = True
    log_to_console: bool = True
    console_log_interval: ConsoleInterval = "10ba"
    """How often, in ep or ba."""
    deterministic_mode: bool = False
    """torch's deterministic algorithms; slower."""
    dist_timeout: float = 600
    """Seconds that a collective operation may take."""

    unresolved: Texts = field(default_factory=dict, metadata=INTERNAL, repr=False)
    """Texts of the values that the yaml takes from the environment, by their places."""

    @property
    def loaders(self) -> dict[str, LoaderConfig]:
        """The loaders by side: `train` and, where there is one, `eval`."""
        sides = {"train": self.train_loader, "eval": self.eval_loader}
        return {side: loader for side, loader in sides.items() if loader is not None}

    @property
    def shard_degree(self) -> int | None:
        """`fsdp_config.data_parallel_shard_degree`; None where it is empty."""
        return self.fsdp_config.data_parallel_shard_degree if self.fsdp_config else None

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
        from vlm_composer.config.checks import mistakes  # it needs this module's types

        errors: list[str] = []
        data, unresolved = read_yaml(path, overrides)
        config = build(cls, data, "", errors)
        if config is not None:
            config.unresolved = unresolved
            errors += mistakes(config)
        if errors or config is None:
            raise ConfigError(str(path), [_without_values(e, data, unresolved) for e in errors])
        return config

    def recorded(self) -> dict[str, Any]:
        """Return the configuration for logs, checkpoints and reports, as plain values: what the
        yaml takes from the environment stands there as the yaml has it."""
        settings = asdict(self)
        del settings["unresolved"]
        for (*sections, name), text in self.unresolved.items():
            section: Any = settings
            for part in sections:
                section = section[part]
            section[name] = text
        return settings

    def folder(self, text: str) -> str:
        """Fill `{run_folder}` and `{run_name}` into a path."""
        run_folder = self.run_folder.replace("{run_name}", self.run_name)
        return text.replace("{run_folder}", run_folder).replace("{run_name}", self.run_name)


def _without_values(error: str, data: dict[str, Any], unresolved: Texts) -> str:
    """Put the texts of values from the environment into a message in place of the values."""
    for place, text in unresolved.items():
        value: Any = data
        for part in place:
            value = value[part]
        error = error.replace(value, text) if len(value) >= _SECRET_CHARACTERS else error
    return error
