"""Claim: the full-size model trains on one CPU machine with 24 GB, near what its products can do.

`yamls/stage1_trial.yaml` with Qwen3-8B and SigLIP2-SO400M at their real sizes and random weights
(`pretrained: false`), on pairs like LLaVA-Pretrain's, through the Composer launcher as a user would
start it. One optimizer step warms up and compiles; the next two, of two micro-batches of 4 each,
are measured.

    python benchmarks/full_size.py [--quick] [--json FILE]

Prints a table and exits 1 where a row falls short. Takes about 21 GiB and nothing beside it, and a
CPU with AVX512-BF16 or AMX: without, it says so and stops. `--quick` shows with small towers that
everything works.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # for every process
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests' byte tokenizer

import torch  # noqa: E402

from benchmarks.faithful_towers import write_pairs  # noqa: E402
from benchmarks.launched_run import LaunchedRun  # noqa: E402
from tiny import byte_tokenizer  # noqa: E402
from vlm_composer.training.hardware import has_native_bf16, measure_peak_flops  # noqa: E402
from vlm_composer.training.step_parts import PARTS  # noqa: E402

YAML = ROOT / "yamls" / "stage1_trial.yaml"
MICROBATCH, ACCUMULATION, WARM_UP, MEASURED = 4, 2, 1, 2
"""Samples of a micro-batch, micro-batches of a step, steps left out and measured."""
GEMM_SIZES = (2048, 4096)

MOST_MEMORY = 21.0
"""GiB: what 24 GB leave to a training beside the system."""
MOST_SECONDS, LEAST_SHARE = 3.0, 0.55
"""A sample, or of the GEMM peak: either will do, for the first depends on the machine."""

GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Has glibc give back at once what takes a MiB or more; else it keeps holes of a GiB in all."""

SMALL = {
    "vision_tower.config_overrides": {
        "hidden_size": 144,
        "intermediate_size": 288,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "language_model.config_overrides": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
"""Towers of `--quick`."""


@dataclass
class Measured:
    """What one training showed."""

    peak_gib: float
    """Most resident memory of its largest process, from its start to its end."""
    seconds_a_sample: list[float]
    """Of each measured step, data included."""
    share_of_peak: list[float]
    """Useful operations of each measured step by its time and the GEMM peak."""
    gemm_gflops: float
    seconds_beside_steps: float
    """Of the whole run: to draw 8.6 G random weights, and to hash them at its start and end."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of a measured step by what it was spent on."""


def measure(folder: Path, small: bool) -> Measured:
    """Train as a user would and read what the training logged.

    Raises:
        RuntimeError: It failed; the message is the end of its log.
    """
    tell("writing pairs")
    write_pairs(folder, MICROBATCH * ACCUMULATION * (WARM_UP + MEASURED))
    byte_tokenizer().save_pretrained(str(folder / "tokenizer"))
    tell("measuring the GEMM peak")
    peaks = [measure_peak_flops(torch.bfloat16, size, repeats=3) for size in GEMM_SIZES]
    tell("training")
    os.environ.update(GIVE_BACK)
    started = time.monotonic()
    metrics = LaunchedRun(YAML, folder, overrides=overrides(folder, small)).metrics()
    whole_run = time.monotonic() - started
    peaks += [measure_peak_flops(torch.bfloat16, size, repeats=3) for size in GEMM_SIZES]
    return Measured(
        # The launcher has waited for its rank, and this process for the launcher.
        peak_gib=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        seconds_a_sample=[1 / rate for rate in metrics["throughput/samples_per_sec"]],
        share_of_peak=[rate / max(peaks) for rate in metrics["throughput/flops_per_sec"]],
        gemm_gflops=max(peaks) / 1e9,
        seconds_beside_steps=whole_run - metrics["time/train"][-1] * 3600,
        parts={text: statistics.mean(metrics[f"time/{part}"]) for part, text in PARTS.items()},
    )


def overrides(folder: Path, small: bool) -> dict[str, Any]:
    """What differs from the trial's yaml: the weights, the data, and how long it trains.

    Args:
        folder: Of `measure`.
        small: Take small towers.
    """
    return {
        "vision_tower.pretrained": False,
        "language_model.pretrained": False,
        "language_model.tokenizer": folder / "tokenizer",
        "variables.data": folder / "mds",
        "train_loader.num_workers": 0,  # all in one process, whose memory is then the run's
        "eval_loader": None,
        "eval_first": False,
        "global_train_batch_size": MICROBATCH * ACCUMULATION,
        "device_train_microbatch_size": MICROBATCH,
        "max_duration": f"{WARM_UP + MEASURED}ba",
        "device": "cpu",
        "save_folder": None,
        "autoresume": False,
        "callbacks.step_times": {"warmup_batches": WARM_UP, "interval": "1ba"},
        "callbacks.evidence": None,  # looks at the evaluation
        "callbacks.captions": None,
        "loggers.wandb": None,
        **(SMALL if small else {}),
    }


def _free_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    raise OSError("/proc/meminfo has no MemAvailable")


def tell(what: str) -> None:
    """Say what is being done, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print the table, and say whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small towers; nothing is judged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if not args.quick and not has_native_bf16("cpu"):
        print(
            "this CPU has neither AVX512-BF16 nor AMX: three steps in bf16 would take many hours, "
            "and in fp32 the towers alone take 32 GiB; --quick runs anywhere",
            file=sys.stderr,
        )
        return 1
    if not args.quick and (free := _free_gib()) < MOST_MEMORY:
        print(f"{free:.1f} GiB are free and {MOST_MEMORY:.0f} are needed", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="full-size-") as folder:
        found = measure(Path(folder), small=args.quick)
    if args.json:
        args.json.write_text(json.dumps(asdict(found), indent=2) + "\n")

    seconds, share = max(found.seconds_a_sample), min(found.share_of_peak)
    rows = [
        (
            found.peak_gib <= MOST_MEMORY,
            f"peak memory {found.peak_gib:.2f} GiB",
            f"≤ {MOST_MEMORY:g} GiB",
        ),
        (
            seconds <= MOST_SECONDS or share >= LEAST_SHARE,
            f"{_range(found.seconds_a_sample, '.2f')} s a sample, "
            f"{_range([100 * s for s in found.share_of_peak], '.0f')} % of the GEMM peak",
            f"≤ {MOST_SECONDS:g} s, or ≥ {LEAST_SHARE:.0%}",
        ),
    ]
    for ok, text, bound in rows:
        print(f"{'' if args.quick else 'ok' if ok else 'FAILS':<6} {text:<50} {bound}")
    print(f"GEMM peak {found.gemm_gflops:.0f} GFLOP/s in bf16, {torch.get_num_threads()} threads")
    print(f"{found.seconds_beside_steps:.0f} s beside the steps; a step in the mean:")
    for part, value in found.parts.items():
        print(f"       {part:<20} {value:8.2f} s")
    return 0 if args.quick or all(ok for ok, _, _ in rows) else 1


def _range(values: list[float], form: str) -> str:
    return "–".join(format(value, form) for value in sorted({min(values), max(values)}))


if __name__ == "__main__":
    sys.exit(main())
