"""Trainings of `alignment.py`: the demo's, from features, with one connector or another.

Shape suffixes: B images, N patches, V vision width, D LLM width.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import reproducibility
from torch import Tensor, nn

from vlm_composer.assembly import assemble_model, assemble_template
from vlm_composer.config import TrainConfig
from vlm_composer.config.reports import CallbacksConfig, EvidenceConfig
from vlm_composer.data.features import Features
from vlm_composer.loaders import (
    assemble_encoder,
    assemble_evaluators,
    assemble_train_loader,
    features_of,
)
from vlm_composer.mds.index import FEATURES_FILE
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.training.freezing import count_parameters
from vlm_composer.training.hardware import choose_device
from vlm_composer.training.metrics_file import read_metrics
from vlm_composer.training.towers_identity import check_features, identify_towers
from vlm_composer.training.trainer import build_trainer

YAML = Path(__file__).parent.parent / "yamls" / "demo.yaml"
PERCEIVER, MLP, LINEAR = CONNECTORS = ("perceiver + MLP", "MLP alone", "linear layer")


class EveryPatch(nn.Module):
    """A connector without a resampler: every patch becomes a token.

    Args:
        num_patches: Patches an image (N).
        vision_ln: LayerNorm(V) on the patches, as before the resampler.
        projector: Maps (B, N, V) to (B, N, D).
    """

    def __init__(self, num_patches: int, vision_ln: nn.LayerNorm, projector: nn.Module) -> None:
        super().__init__()
        self.num_image_tokens = num_patches
        self.vision_ln = vision_ln
        self.resampler = nn.Identity()  # the project's log names this part
        self.projector = projector

    def forward(self, patches_BNV: Tensor) -> Tensor:
        """Map patches (B, N, V) to image tokens (B, N, D)."""
        return self.projector(self.vision_ln(patches_BNV.float()))


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        connector: One of `CONNECTORS`.
        recipe: Name of its settings.
        seed: Of weights and order.
        overrides: `key=value` for the demo's yaml.
    """

    connector: str
    recipe: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """For messages and its folder."""
        return f"{self.connector}, {self.recipe}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        parameters: That were trained.
        tokens: Of an image.
        cpu_seconds: Of a step, the median, in one thread.
        evidence: Metric → (batch, value) pairs, of the whole evaluation set.
        warnings: That were given, by name, with their batches.
    """

    parameters: int
    tokens: int
    cpu_seconds: float
    evidence: dict[str, list[tuple[int, float]]]
    warnings: list[tuple[int, str]]

    def last(self, metric: str) -> float:
        """The value at the end."""
        return self.evidence[metric][-1][1]


class StepTimes(Callback):
    """CPU time of the steps, data included: the trainings are not alone on the machine."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        del state, logger
        self._start = time.process_time()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop the clock."""
        del state, logger
        self.seconds.append(time.process_time() - self._start)


def train(
    connection: Connection,
    training: Training,
    demo: Path,
    features: Path,
    evidence: EvidenceConfig,
    out: Path,
) -> None:
    """Train as `train.py` does, and send the outcome.

    Args:
        connection: To the process that wants it.
        training: What to train.
        demo: The demo's folder, with its towers.
        features: What `convert.features` made of its data.
        evidence: What is asked at each evaluation.
        out: The run's folder.
    """
    config = _read_config(training, demo, features, evidence, out)
    device = choose_device(config.device)
    template = assemble_template(config)
    encoder = assemble_encoder(config, template)
    train_data = assemble_train_loader(config, encoder, device)
    evaluators = assemble_evaluators(config, encoder, device)
    reproducibility.seed_all(config.seed)
    vlm: Any = assemble_model(config, device, template.image_token_id)
    if training.connector != PERCEIVER:
        vlm.connector = _every_patch(training.connector, vlm)
    towers = identify_towers(config, vlm)
    check_features(features_of(train_data, evaluators), towers)
    trainer = build_trainer(
        config, vlm, train_data, evaluators, device, towers=towers, save_folder=None
    )
    times = StepTimes()
    trainer.state.callbacks.append(times)
    trainer.fit()
    trainer.close()
    metrics = read_metrics(out / "metrics.jsonl")
    connection.send(
        Outcome(
            parameters=count_parameters(vlm.connector),
            tokens=vlm.connector.num_image_tokens,
            cpu_seconds=statistics.median(times.seconds),
            evidence={
                name.removeprefix("evidence/"): values
                for name, values in metrics.items()
                if name.startswith("evidence/")
            },
            warnings=sorted(
                (batch, name.removeprefix("warnings/"))
                for name, values in metrics.items()
                if name.startswith("warnings/")
                for batch, _ in values
            ),
        )
    )


def demo_config(demo: Path, *overrides: str) -> TrainConfig:
    """The demo's yaml, for a folder of the demo that may be elsewhere."""
    places = {
        "vision_tower.name": demo / "dinov2-small",
        "language_model.name": demo / "smollm2-135m-instruct",
        "train_loader.dataset.local": demo / "mds" / "train",
        "eval_loader.dataset.local": demo / "mds" / "eval",
    }
    return TrainConfig.read(YAML, [*(f"{key}={path}" for key, path in places.items()), *overrides])


def _read_config(
    training: Training, demo: Path, features: Path, evidence: EvidenceConfig, out: Path
) -> TrainConfig:
    overrides = [
        f"seed={training.seed}",
        f"run_folder={out}",
        f"train_loader.dataset.local={features / 'train'}",
        f"eval_loader.dataset.local={features / 'eval'}",
        "train_loader.num_workers=0",  # the steps' CPU time is then this process's
        "eval_loader.num_workers=0",
        "eval_loader.mismatched_images=false",  # the evidence is of the whole set
        "eval_first=false",
        *training.overrides,
    ]
    if training.connector != PERCEIVER:
        num_patches = Features.read(features / "train" / FEATURES_FILE).num_patches
        overrides.append(f"connector.resampler.num_latents={num_patches}")  # for the template
    return replace(
        demo_config(demo, *overrides),
        callbacks=CallbacksConfig(evidence=evidence),
        save_folder=None,
        progress_bar=False,
    )


def _every_patch(connector: str, vlm: VisionLanguageModel) -> EveryPatch:
    """The alternative of that name, with the norm of the model's own connector."""
    tower, llm_width = vlm.vision_tower, vlm.language_model.hidden_size
    mlp = functools.partial(MLPProjector, mlp_ratio=4)
    projector = {MLP: mlp, LINEAR: nn.Linear}[connector](tower.hidden_size, llm_width)
    vision_ln = vlm.connector.vision_ln
    assert vision_ln is not None
    return EveryPatch(tower.num_patches, vision_ln, projector)
