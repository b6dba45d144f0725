"""`run.json`: what a run was, for its report, for a model card, and for whoever repeats it.

Rank 0 writes it when the fit starts and completes it when it ends. Its entries are those of
`Facts`, and of each `Leg`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from composer import Callback, DataSpec, Evaluator, Logger, State
from composer.utils import dist

from vlm_composer.config import TrainConfig
from vlm_composer.config.data import LoaderConfig
from vlm_composer.data.opening import read_of_conversion
from vlm_composer.local_files import move_durably, partial_path
from vlm_composer.mds.json_object import parse_object
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.outages import best_effort
from vlm_composer.training.freezing import parts
from vlm_composer.training.hardware import device_memory
from vlm_composer.training.towers_identity import Identity

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
"""Name of the file in the run's folder."""

_PACKAGES = (
    "vlm-composer",
    "torch",
    "torchvision",
    "mosaicml",
    "mosaicml-streaming",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
)


@dataclass
class Leg:
    """One stretch of a run, from a start to its end or its interruption."""

    batch: int
    """Batches that were done when it started; 0 unless it resumed."""
    start: str
    """UTC, ISO 8601."""
    seconds: float = 0.0
    """How long it has gone on; that of its last evaluation where it was killed."""
    last_batch: int = 0
    """Batches done by then."""


@dataclass
class Facts:
    """The document."""

    run_name: str
    command: list[str]
    """As it was started."""
    config: dict[str, Any]
    """The whole configuration, defaults included."""
    seeds: dict[str, int]
    """`seed`: connector and ranks. `shuffle_seed`: order of the data."""
    versions: dict[str, str]
    """Of Python and the packages that decide results."""
    commit: str | None
    """Of this project's repository, with "+" where it had changes; None outside of one."""
    hardware: dict[str, Any]
    """`device` (its name), `device_kind`, `memory_bytes` a rank, `cpu`, `cpu_cores`, `ranks`,
    `nodes`, `platform`."""
    towers: dict[str, Any]
    """Identity of both frozen towers, see `towers_identity`: hashes of configuration and
    weights."""
    parameters: dict[str, dict[str, Any]]
    """For each part `parameters`, `trained`, `dtype`."""
    data: dict[str, Any]
    """For `train` and `eval`: `samples`, `index_xxh64`, `kind` (images or features), `place`. And
    `summary`: the conversion's `summary.json`, or None where there is none within reach."""
    started: str
    """UTC, ISO 8601: the first leg's."""
    ended: str | None = None
    """UTC; None while the run goes on, or where it was killed."""
    wall_seconds: float = 0.0
    """Sum over the legs, evaluation included."""
    batches: int = 0
    """Done."""
    samples: int = 0
    """Done, over all epochs."""
    resumed_at: list[int] = field(default_factory=list)
    """The batches after which the run was resumed."""
    legs: list[Leg] = field(default_factory=list)


class RunFacts(Callback):
    """Writes `run.json` into the run's folder; a resumed run appends its leg.

    Args:
        config: The run.
        towers: Identity of the frozen towers.
        train: Training data.
        evaluators: Evaluation data; may be empty.
        vlm: The model.
        command: What the process was started with.
    """

    def __init__(
        self,
        config: TrainConfig,
        towers: Identity,
        train: DataSpec,
        evaluators: Sequence[Evaluator],
        vlm: VisionLanguageModel,
        command: Sequence[str],
    ) -> None:
        self.path = Path(config.folder("{run_folder}")) / RUN_FILE
        self._config = config
        self._towers = towers
        self._train, self._evaluators = train, evaluators
        self._command = list(command)
        # Now, for FSDP2 will have sharded them.
        self._parameters = describe_parts(vlm)
        self._facts: Facts | None = None
        self._clock = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Write what is known at the start."""
        del logger
        if dist.get_global_rank() != 0:
            return
        self._clock = time.monotonic()
        batch = state.timestamp.batch.value
        with best_effort("collect what describes the run"):
            facts = self._collect(state.device.name)
            if batch:
                facts.resumed_at.append(batch)
                with best_effort(f"read {self.path}"):
                    self._take_over(facts)
            facts.legs.append(Leg(batch, _now(), last_batch=batch))
            self._facts = facts
        self._write(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note how far the run has come; its last evaluation comes after its last batch."""
        del logger
        self._write(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Complete the file."""
        del logger
        if self._facts is not None:
            self._facts.ended = _now()
            self._write(state)

    def _collect(self, device: str) -> Facts:
        config = self._config
        return Facts(
            run_name=config.run_name,
            command=self._command,
            config=config.recorded(),
            seeds={"seed": config.seed, "shuffle_seed": config.train_loader.dataset.shuffle_seed},
            versions=_versions(),
            commit=_commit(),
            hardware=_hardware(device),
            towers=dict(self._towers),
            parameters=self._parameters,
            data=self._describe_data(),
            started=_now(),
        )

    def _describe_data(self) -> dict[str, Any]:
        config = self._config
        data = {"train": _describe(self._train.dataloader, config.train_loader)}
        if config.eval_loader is not None and self._evaluators:
            loader: Any = self._evaluators[0].dataloader
            data["eval"] = _describe(loader.dataloader, config.eval_loader)
        return data | {"summary": _summary(config.train_loader)}

    def _take_over(self, facts: Facts) -> None:
        """Take what earlier legs left in the file; on another machine there may be none."""
        if not self.path.exists():
            log.info("%s is not here: it begins with the resumed part of the run.", self.path)
            return
        before = json.loads(self.path.read_text(encoding="utf-8"))
        legs = [
            Leg(int(leg["batch"]), str(leg["start"]), float(leg["seconds"]), int(leg["last_batch"]))
            for leg in before["legs"]
        ]
        resumed_at = [*map(int, before["resumed_at"]), *facts.resumed_at]
        facts.started, facts.legs, facts.resumed_at = str(before["started"]), legs, resumed_at

    def _write(self, state: State) -> None:
        facts = self._facts
        if facts is None:
            return
        leg = facts.legs[-1]
        leg.seconds = time.monotonic() - self._clock
        leg.last_batch = facts.batches = state.timestamp.batch.value
        facts.samples = state.timestamp.sample.value
        facts.wall_seconds = sum(leg.seconds for leg in facts.legs)
        if facts.ended is not None:
            facts.ended = _now()
        with best_effort(f"write {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = partial_path(self.path)
            try:
                text = json.dumps(asdict(facts), indent=2, default=str)
                partial.write_text(text, encoding="utf-8")
                move_durably(partial, self.path)
            finally:
                partial.unlink(missing_ok=True)


def describe_parts(vlm: VisionLanguageModel) -> dict[str, dict[str, Any]]:
    """Parameters of each part, whether it is trained, and in which dtype its weights are."""
    described = {}
    for name, module in parts(vlm).items():
        weights = list(module.parameters())
        described[name] = {
            "parameters": sum(p.numel() for p in weights),
            "trained": any(p.requires_grad for p in weights),
            "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in weights})),
        }
    return described


def _describe(loader: Any, section: LoaderConfig) -> dict[str, Any]:
    """Describe a loader's data sets, or those that its samples are taken from by index."""
    captions = getattr(loader.dataset, "captions", loader.dataset)
    return captions.fingerprint | {
        "kind": "features" if captions.features else "images",
        "place": ", ".join(source.place for source in section.sources.values()),
    }


def _summary(section: LoaderConfig) -> dict[str, Any] | None:
    """The conversion's summary of the training shards, the first of several data sets."""
    place = next(iter(section.sources.values())).place
    with best_effort(f"read summary.json of the data in {place}"):
        found = read_of_conversion(place, "summary.json")
        return parse_object(found[0]) if found else None
    return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # run from a checkout that is not installed
    return found


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 10}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], **options).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes.strip() else "")


def _hardware(device: str) -> dict[str, Any]:
    memory, name = device_memory(device)
    return {
        "device": name if device == "gpu" else _cpu_name(),
        "device_kind": device,
        "memory_bytes": int(memory),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "ranks": dist.get_world_size(),
        "nodes": dist.get_world_size() // dist.get_local_world_size(),
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
