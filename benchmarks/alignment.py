"""Claim: the connector learns to see on every seed, and sooner with the demo's learning rate than
with stage 1's.

Trains on the demo's towers and pairs, at equal steps, from three seeds: the perceiver with its MLP
at both learning rates, and at the demo's also what could stand in its place, an MLP alone and a
linear layer, both on every patch. The vision tower runs once, before. What the whole evaluation set
says at the end is printed, whoever is ahead.

    python benchmarks/alignment.py [--quick] [--demo FOLDER] [--jobs N] [--json FILE]

Prints a table and exits 1 where a row falls short.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # for every process
os.environ.setdefault("OMP_NUM_THREADS", "1")  # trainings run beside each other
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.alignment_runs import (
    CONNECTORS,
    PERCEIVER,
    Outcome,
    Training,
    demo_config,
    train,
)
from benchmarks.contenders import Contender
from convert.feature_pass import make_features
from vlm_composer.config.reports import EvidenceConfig
from vlm_composer.demo.__main__ import FOLDER, MARGIN, prepare

SEEDS = (17, 18, 19)
DEMO, STAGE_1 = "demo's learning rate", "stage 1's learning rate"
RECIPES: dict[str, tuple[str, ...]] = {DEMO: (), STAGE_1: ("optimizer.lr=1e-3",)}
"""What they change in the demo's yaml."""
CONTENDERS = ((PERCEIVER, STAGE_1), *((connector, DEMO) for connector in CONNECTORS))
"""Connectors with their recipes."""
WHOLE_SET = 97
"""Samples of the demo's evaluation set."""


@dataclass(frozen=True)
class Effort:
    """How much is trained and asked."""

    seeds: tuple[int, ...] = SEEDS
    overrides: tuple[str, ...] = ("max_duration=300ba", "eval_interval=300ba")
    num_samples: int = WHOLE_SET
    num_choices: int = 4


QUICK = Effort(
    seeds=SEEDS[:1],
    overrides=("max_duration=4ba", "eval_interval=4ba", "scheduler.t_warmup=1ba"),
    num_samples=8,
    num_choices=2,
)


@dataclass(frozen=True)
class Claim:
    """One claim, which must hold on every seed.

    Attributes:
        text: What is claimed.
        values: A figure a seed.
        least: That each must be more than.
    """

    text: str
    values: Sequence[float]
    least: float

    @property
    def holds(self) -> bool:
        """Whether it holds on every seed."""
        return all(value > self.least for value in self.values)

    def line(self, *, enforced: bool) -> str:
        """A line with a verdict where the claim is enforced."""
        verdict = ("ok" if self.holds else "FAILS") if enforced else ""
        return f"{verdict:<6}{self.text:<80} > {self.least:<4g}  {_seeds(self.values)}"


Outcomes = dict[tuple[str, str], list[Outcome]]
"""By connector and recipe, in the order of the seeds."""


def measure(demo: Path, effort: Effort, jobs: int, folder: Path) -> Outcomes:
    """Train everything.

    Args:
        demo: The demo's folder.
        effort: How much.
        jobs: Trainings at once.
        folder: An empty folder.
    """
    tell("running the vision tower")
    make_features(demo_config(demo), folder / "features", show_progress=False)
    trainings = [
        Training(connector, recipe, seed, (*RECIPES[recipe], *effort.overrides))
        for seed in effort.seeds
        for connector, recipe in CONTENDERS
    ]

    def outcome(training: Training) -> Outcome:
        tell(f"training {training.name}")
        contender = Contender(
            training.name,
            train,
            folder,
            training=training,
            demo=demo,
            features=folder / "features",
            evidence=EvidenceConfig(effort.num_samples, effort.num_choices),
        )
        try:
            found: Outcome = contender.result()
        finally:
            contender.close()
        loss, gap = found.last("loss_right"), found.last("gap_wrong")
        tell(f"{training.name}: held-out loss {loss:.3f}, gap {gap:.3f}")
        return found

    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(outcome, trainings))
    outcomes: Outcomes = {}
    for training, one in zip(trainings, found, strict=True):
        outcomes.setdefault((training.connector, training.recipe), []).append(one)
    return outcomes


def table(outcomes: Outcomes) -> list[str]:
    """Lines with what each contender came to, a figure a seed."""
    lines = []
    for (connector, recipe), found in outcomes.items():
        lines.append(
            f"{connector}, {recipe}: {found[0].parameters:,} parameters, {found[0].tokens} tokens "
            f"an image, {1000 * min(one.cpu_seconds for one in found):.0f} ms of CPU a step"
        )
        for name, metric in (
            ("held-out loss, right images", "loss_right"),
            ("gap to wrong images", "gap_wrong"),
            ("retrieval accuracy", "retrieval_accuracy"),
            ("output norm / embedding norm", "output_norm_ratio"),
        ):
            lines.append(f"       {name:<30}{_seeds([one.last(metric) for one in found])}")
    return lines


def claims(outcomes: Outcomes) -> list[Claim]:
    """What must hold."""
    ours, stage_1 = outcomes[PERCEIVER, DEMO], outcomes[PERCEIVER, STAGE_1]
    return [
        Claim(
            f"{PERCEIVER}, {DEMO}: gap to wrong images",
            [one.last("gap_wrong") for one in ours],
            MARGIN,
        ),
        Claim(
            f"{PERCEIVER}: gap, {DEMO} less {STAGE_1}",
            [
                one.last("gap_wrong") - other.last("gap_wrong")
                for one, other in zip(ours, stage_1, strict=True)
            ],
            0,
        ),
    ]


def tell(what: str) -> None:
    """Say what is being done, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print the table, and say whether it holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is judged")
    parser.add_argument(
        "--demo", type=Path, default=FOLDER, metavar="FOLDER", help="made where it is not there"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="trainings at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    prepare(args.demo)
    with tempfile.TemporaryDirectory(prefix="alignment-") as folder:
        effort = QUICK if args.quick else Effort()
        outcomes = measure(args.demo.resolve(), effort, args.jobs, Path(folder))
    print("\n".join(table(outcomes)))
    judged = claims(outcomes)
    for claim in judged:
        print(claim.line(enforced=not args.quick))
    if args.json:
        report = {
            f"{connector}, {recipe}": [asdict(one) for one in found]
            for (connector, recipe), found in outcomes.items()
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if args.quick or all(claim.holds for claim in judged) else 1


def _seeds(values: Sequence[float]) -> str:
    return "".join(f"{value:9.4g}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
