"""Claim: a connector trains about twice as fast as with Hugging Face's Trainer, in a third of the
memory, at half of what the processor's matrix products reach.

Both trainers start from the same weights and see the same samples in the same order with the same
optimizer; that they compute the same gradients is asserted first. They are processes of their own,
take turns of a step or two, and a row's figure is the median over such pairs of turns, once in CPU
time of all threads and once in wall time. A row holds where both medians do.

    python benchmarks/throughput.py [--quick] [--json FILE]

Prints a table and exits 1 where a row falls short. OMP_NUM_THREADS sets the threads of both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # for every process
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.contenders import Contender, train_hf, train_ours
from benchmarks.equal_gradients import Distances, compare_gradients
from benchmarks.faithful_towers import (
    DTYPE,
    FAITHFUL,
    LARGE_VOCABULARY,
    TINY,
    TINY_384,
    TORCH_DTYPE,
    Shape,
    read_yaml,
    training_yaml,
    write_pairs,
    write_towers,
)
from benchmarks.gate import Chunk, Order
from benchmarks.hf_baseline import NormalisedPairs, read_template
from benchmarks.loading_speed import compare_loading
from benchmarks.throughput_rows import Row, both, losses_row, overhead_row, speed_row
from vlm_composer.assembly import assemble_model, unloaded
from vlm_composer.models.flops import training_flops
from vlm_composer.models.packing import num_answer_tokens
from vlm_composer.training.hardware import measure_peak_flops

SMALL, LARGE = 4, 16
"""Micro-batches."""
WARM_UP = 3
"""Steps that compile for rows of several lengths and are left out."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    shape: Shape = FAITHFUL
    memory_shape: Shape = LARGE_VOCABULARY
    loader_shape: Shape = TINY_384
    num_samples: int = 512
    rounds: int = 7
    """Of turns at both micro-batches."""
    overhead_pairs: int = 12
    memory_steps: int = 3
    loader_rounds: int = 5
    gemm_sizes: tuple[int, ...] = (2048, 4096)
    compile_backend: str = "inductor"


QUICK = Effort(TINY, TINY, TINY, 64, 2, 3, 1, 2, (1024,), "aot_eager")


class Bench:
    """Towers and pairs in a folder, and the rows measured with them.

    Args:
        folder: An empty folder.
        effort: How much to measure.
    """

    def __init__(self, folder: Path, effort: Effort) -> None:
        self.folder, self.effort = folder, effort
        self.facts: dict[str, Any] = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "amx": torch.cpu._is_amx_tile_supported(),
            "dtype": DTYPE,
        }
        tell(f"writing {effort.num_samples} pairs and the towers")
        self.data, self.towers = folder / "data", folder / "towers"
        self.data.mkdir()
        write_pairs(self.data, effort.num_samples)
        write_towers(effort.shape, self.towers)

    def gradients(self) -> Distances:
        """How far both sides' gradients are from the reference."""
        tell("comparing gradients")
        contender = self._contender("gradients", compare_gradients, SMALL)
        distances: Distances = contender.result()
        contender.close()
        self.facts["gradients"] = {k: v for k, v in asdict(distances).items() if v is not None}
        return distances

    def speed(self) -> list[Row]:
        """Ours against Hugging Face, against the matrix products, and against a bare loop."""
        contenders: dict[str, Contender] = {}
        chunks: dict[str, list[Chunk]] = {}
        compiled = {"compile_backend": self.effort.compile_backend}
        try:
            for name, target, size, options in (
                ("HF compiled 16", train_hf, LARGE, compiled),
                ("HF 4", train_hf, SMALL, {}),
                ("ours 4", train_ours, SMALL, {}),
                ("HF 16", train_hf, LARGE, {}),
                ("ours 16", train_ours, LARGE, {}),
            ):
                contenders[name] = contender = self._contender(name, target, size, **options)
                tell(f"warming up {name}")  # one by one: together they take several times as long
                contender.result()
                chunks[name] = [contender.run(WARM_UP)]
            peaks, steps = [], {SMALL: 2, LARGE: 1}
            for number in range(self.effort.rounds):
                tell(f"round {number + 1} of {self.effort.rounds}")
                # To and fro, so that none always runs behind the same other.
                for name in list(contenders)[:: 1 if number % 2 else -1]:
                    chunks[name].append(contenders[name].run(steps[_microbatch_size(name)]))
                peaks.append(self._peak_flops())
            tell("comparing Composer's loop with a bare one")
            pairs = [
                contenders["ours 4"].run(1, bare=True) for _ in range(self.effort.overhead_pairs)
            ]
        finally:
            for contender in contenders.values():
                contender.close()
        timed = {name: parts[1:] for name, parts in chunks.items()}
        shares = {name: self._shares(name, parts, peaks) for name, parts in timed.items()}
        self._note_speed(timed, shares, peaks)
        return [
            speed_row("× HF Trainer, micro-batch 4", 2.0, timed["HF 4"], timed["ours 4"]),
            speed_row("× HF Trainer, micro-batch 16", 2.3, timed["HF 16"], timed["ours 16"]),
            speed_row(
                "× HF with compiled layers, micro-batch 16",
                1.7,
                timed["HF compiled 16"],
                timed["ours 16"],
            ),
            Row(f"of the {DTYPE} GEMM peak, micro-batch 16", 0.5, values=shares["ours 16"]),
            overhead_row(pairs),
            losses_row(chunks, (SMALL, LARGE)),
        ]

    def memory(self) -> Row:
        """Activations above the weights, in fresh processes."""
        towers = self.folder / "memory-towers"
        tell("measuring memory: writing towers with a large vocabulary")
        write_towers(self.effort.memory_shape, towers)
        above: dict[str, list[float]] = {}
        for name, target in (("ours", train_ours), ("HF", train_hf)):
            tell(f"measuring memory: {name}")
            contender = self._contender(
                f"{name} memory", target, SMALL, shape=self.effort.memory_shape, towers=towers
            )
            contender.result()  # it is ready
            contender.run(WARM_UP)
            chunks = [
                contender.run(1, measure_memory=True) for _ in range(self.effort.memory_steps)
            ]
            contender.close()
            above[name] = [chunk.peak_mib - chunk.weights_mib for chunk in chunks]
            self.facts[f"memory of {name}, MiB"] = {
                "weights and libraries": statistics.median(c.weights_mib for c in chunks),
                "activations": statistics.median(above[name]),
                "peak": max(c.peak_mib for c in chunks),
            }
        ratios = [ours / hf for ours, hf in zip(above["ours"], above["HF"], strict=True)]
        name = f"× HF's activation memory, vocabulary {self.effort.memory_shape.vocab_size:,}"
        return Row(name, 1 / 3, at_most=True, values={"memory": ratios})

    def loading(self) -> Row:
        """One worker process against the decoding alone."""
        tell("measuring the loader")
        shape, towers = self.effort.loader_shape, self.folder / "loader-towers"
        write_towers(shape, towers)
        contender = self._contender("loader", compare_loading, LARGE, shape=shape, towers=towers)
        pairs = []
        for _ in range(self.effort.loader_rounds):
            contender.give(Order(1))
            pairs.append(contender.result())
        contender.close()
        cpu, wall = (list(values) for values in zip(*pairs, strict=True))
        name = f"of one core's decoding to {shape.image_size} px, a loader's worker"
        return Row(name, 0.9, values=both(cpu, wall))

    def _contender(self, name: str, target: Any, size: int, **options: Any) -> Contender:
        common = {"shape": self.effort.shape, "towers": self.towers, "data": self.data}
        return Contender(name, target, self.folder, **{**common, "size": size, **options})

    def _peak_flops(self) -> float:
        return max(
            measure_peak_flops(TORCH_DTYPE, size, repeats=3) for size in self.effort.gemm_sizes
        )

    def _useful_flops(self, size: int, chunks: list[Chunk]) -> list[float]:
        """Operations of each chunk's samples, as the project counts them for MFU."""
        shape = self.effort.shape
        path = training_yaml(shape, self.towers, self.data, self.folder / "meta.yaml", size)
        with torch.device("meta"):
            model = assemble_model(unloaded(read_yaml(path)), "cpu")
        pairs = NormalisedPairs(self.data, read_template(shape, self.towers), shape.image_size)
        flops = []
        for chunk in chunks:
            first, last = (
                step * size for step in (chunk.first_step, chunk.first_step + chunk.steps)
            )
            labels = [pairs[index % len(pairs)]["labels"] for index in range(first, last)]
            answers = num_answer_tokens(labels)
            flops.append(training_flops(model, map(len, labels), answers).total)
        return flops

    def _shares(self, name: str, chunks: list[Chunk], peaks: list[float]) -> dict[str, list[float]]:
        """Each chunk's share of the GEMM peak of its round."""
        flops = self._useful_flops(_microbatch_size(name), chunks)
        turns = list(zip(flops, chunks, peaks, strict=True))
        cpu = [f / c.time.cpu / (peak / torch.get_num_threads()) for f, c, peak in turns]
        wall = [f / c.time.wall / peak for f, c, peak in turns]
        return both(cpu, wall)

    def _note_speed(
        self,
        timed: dict[str, list[Chunk]],
        shares: dict[str, dict[str, list[float]]],
        peaks: list[float],
    ) -> None:
        self.facts["GEMM peak, GFLOP/s"] = round(statistics.median(peaks) / 1e9)
        for name, chunks in timed.items():
            samples = _microbatch_size(name) * chunks[0].steps
            self.facts[name] = {
                "samples/s": samples / statistics.median(c.time.wall for c in chunks),
                "samples/s of CPU time": samples / statistics.median(c.time.cpu for c in chunks),
                "of the GEMM peak": statistics.median(shares[name]["cpu"]),
            }


def _microbatch_size(contender: str) -> int:
    return int(contender.split()[-1])


def tell(text: str) -> None:
    """Say what takes long, with the time it began."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny towers: shows that it works, enforces no floor"
    )
    parser.add_argument("--json", type=Path, help="also write rows and facts to this file")
    options = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="throughput-"))
    bench = Bench(folder, QUICK if options.quick else Effort())
    if faults := bench.gradients().faults():
        print("\n".join(faults), f"nothing was timed; logs are in {folder}", sep="\n")
        return 1
    rows = [*bench.speed(), bench.memory(), bench.loading()]
    for row in rows:
        print("\n".join(row.lines(enforced=not options.quick)))
    for name, fact in bench.facts.items():
        if isinstance(fact, dict):
            fact = ", ".join(f"{key} {value:.3g}" for key, value in fact.items())
        print(f"{name}: {fact}")
    failed = sum(not row.ok for row in rows)
    seconds = round(time.monotonic() - started)
    if options.quick:
        print(f"tiny towers: no row has to hold; {seconds} s")
    else:
        print(f"{len(rows) - failed} of {len(rows)} rows hold what is promised; {seconds} s")
    if options.json:
        report = {"facts": bench.facts, "rows": [{**asdict(row), "ok": row.ok} for row in rows]}
        options.json.write_text(json.dumps(report, indent=1))
    shutil.rmtree(folder)
    return 1 if failed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
