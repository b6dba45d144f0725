"""Claim: a run that is killed, preempted or cut off from its store ends as if nothing had happened.

Every row is a real run of `vlm_composer/train.py` through the Composer launcher, with tiny towers,
two loader workers, accumulation, shuffling, evaluations in the middle of epochs, and shards and
checkpoints in a real S3 server or Google Cloud Storage emulator. It is disturbed, started again
with the same command and compared with an undisturbed run: every loss, learning rate and sample,
and the final weights, moments and random state.

    python benchmarks/resume.py [--world-size 1 2] [--quick] [--json FILE]

Prints a table and exits 1 where a row falls short.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests' tiny towers and S3 server

from convert import convert_llava  # noqa: E402
from gcs_server import GCSServer  # noqa: E402
from s3_server import S3Server  # noqa: E402
from tiny import save_tower, tiny_qwen3, tiny_siglip, write_pairs  # noqa: E402
from vlm_composer.training.checkpoint_file import WEIGHTS, CheckpointFile  # noqa: E402
from vlm_composer.training.checkpoint_folder import CheckpointFolder  # noqa: E402

BATCHES, EPOCH, SAVE_EVERY = 26, 11, 4
"""Batches of a run and of an epoch, and between two checkpoints."""
RELATIVE = 1e-5
"""How far losses may be apart on another number of ranks."""
STORE_TIMEOUT = 60
LEG_SECONDS = 240


@dataclass
class Row:
    """One disturbed run."""

    name: str
    ranks: tuple[int, int]
    """Before and after the disturbance."""
    parallelism: tuple[str, str]
    batches: int = BATCHES
    store: str = "s3"
    exact: bool = True
    """Promised bitwise; otherwise the same samples and losses within `RELATIVE`."""
    ok: bool = False
    faults: list[str] = field(default_factory=list)
    bitwise: bool = False
    loss_error: float = 0.0
    samples_lost_or_repeated: int = 0
    seconds_to_new_batch: float = 0.0
    checkpoint_bytes: int = 0


class Bench:
    """Towers, shards, a store, and the runs over them.

    Args:
        folder: An empty folder.
        server: A running store whose environment is set.
        dropout: Of the runs that draw random numbers.
    """

    def __init__(self, folder: Path, server: S3Server | GCSServer, dropout: float = 0.1) -> None:
        self.folder, self.server, self.dropout = folder, server, dropout
        self._references: dict[tuple[Any, ...], tuple[list[dict[str, Any]], CheckpointFile]] = {}
        folder.mkdir(exist_ok=True)
        self._bucket = server.make_bucket(f"resume-{os.getpid()}")
        torch.manual_seed(1)
        save_tower(tiny_siglip(), folder / "siglip")
        save_tower(tiny_qwen3(), folder / "qwen3")
        pairs, images = write_pairs(folder, 96)
        for place in (f"{self._bucket}/mds", str(folder / "mds")):
            convert_llava(
                pairs, images, place, eval_ratio=0.07, size_limit=2048, show_progress=False
            )

    def yaml(self, name: str, **changes: Any) -> Path:
        """Write the yaml of run `name`."""
        data = {
            "remote": f"{self._bucket}/mds/train",
            "local": str(self.folder / name / "cache" / "train"),
            "predownload": 8,
        }
        settings = {
            "run_name": name,
            "run_folder": str(self.folder / name),
            "vision_tower": {"name": str(self.folder / "siglip"), "dtype": "fp32"},
            "language_model": {"name": str(self.folder / "qwen3"), "dtype": "fp32"},
            "connector": {
                "resampler": {"num_latents": 4, "depth": 2, "num_heads": 2, "head_dim": 16},
                "projector": {"mlp_ratio": 2},
            },
            "max_seq_len": 64,
            "train_loader": {"dataset": {**data, "shuffle": True}, "num_workers": 2},
            "eval_loader": {
                "dataset": {
                    "remote": f"{self._bucket}/mds/eval",
                    "local": str(self.folder / name / "cache" / "eval"),
                },
                "num_workers": 1,
            },
            "global_train_batch_size": 8,
            "device_train_microbatch_size": 2,
            "max_duration": f"{BATCHES}ba",
            "eval_interval": "5ba",
            "device": "cpu",
            "precision": "fp32",
            "optimizer": {"lr": 1e-3},
            "scheduler": {"t_warmup": "3ba"},
            "algorithms": {"gradient_clipping": {"clipping_type": "norm"}},
            "save_folder": f"{self._bucket}/{name}",
            "save_interval": f"{SAVE_EVERY}ba",
            "autoresume": True,
            "store_timeout": STORE_TIMEOUT,
            "dist_timeout": 60,
            "progress_bar": False,
            "log_to_console": False,
            "deterministic_mode": True,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**settings, **changes}))
        return path

    def start(
        self, name: str, ranks: int, parallelism: str, *, dropout: bool, **environment: str
    ) -> subprocess.Popen[str]:
        """Start run `name`, or go on with it."""
        log = (self.folder / f"{name}.log").open("a")
        return subprocess.Popen(
            [
                *(Path(sys.executable).with_name("composer"), "-n", str(ranks)),
                *(ROOT / "benchmarks" / "recorded_train.py", self.folder / f"{name}.yaml"),
                f"parallelism={parallelism}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "RECORD": str(self.folder / f"{name}.jsonl"),
                "DROPOUT": str(self.dropout if dropout else 0),
                **environment,
            },
        )

    def finish(self, process: subprocess.Popen[str]) -> int:
        """Wait for a run and return its exit code; one that hangs is killed and counts as -9."""
        try:
            return process.wait(LEG_SECONDS)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            return process.wait()

    def records(self, name: str) -> list[dict[str, Any]]:
        """What run `name` has computed, in the order of computing."""
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            return []
        text = path.read_text()
        whole_lines = text[: text.rfind("\n") + 1]  # a killed run may have left half a line
        return [json.loads(line) for line in whole_lines.splitlines()]

    def newest(self, name: str) -> CheckpointFile:
        """The newest checkpoint of run `name`."""
        checkpoint = CheckpointFolder(f"{self._bucket}/{name}", self.folder / "scratch").newest()
        assert checkpoint is not None, f"{name} left no checkpoint"
        return checkpoint

    def undisturbed(
        self, ranks: int, parallelism: str, dropout: bool, batches: int = BATCHES
    ) -> tuple[list[dict[str, Any]], CheckpointFile]:
        """The run that the disturbed ones are compared with; made once."""
        key = (ranks, parallelism, dropout, batches)
        if key not in self._references:
            name = f"undisturbed-{ranks}-{parallelism}-{int(dropout)}-{batches}"
            self.yaml(name, max_duration=f"{batches}ba")
            code = self.finish(self.start(name, ranks, parallelism, dropout=dropout))
            if code:
                raise RuntimeError((self.folder / f"{name}.log").read_text()[-4000:])
            self._references[key] = self.records(name), self.newest(name)
        return self._references[key]

    def judge(self, row: Row, name: str, codes: list[int], allowed: list[int]) -> Row:
        """Compare run `name` with the undisturbed one."""
        expected, reference = self.undisturbed(
            row.ranks[0], row.parallelism[0], row.exact, row.batches
        )
        found = self.records(name)
        if codes[:-1] != allowed or codes[-1]:
            row.faults.append(f"exit codes {codes}, expected {[*allowed, 0]}")
            row.faults += (self.folder / f"{name}.log").read_text().splitlines()[-20:]
            return row
        by_batch = {record["batch"]: record for record in expected}
        if {record["batch"] for record in found} != by_batch.keys():
            row.faults.append("batches are missing")
        same_losses = True
        for record in found:  # a batch that was computed twice is judged twice
            other = by_batch[record["batch"]]
            row.samples_lost_or_repeated += len(set(other["ids"]) ^ set(record["ids"]))
            error = abs(record["loss"] - other["loss"]) / other["loss"]
            row.loss_error = max(row.loss_error, error)
            same_losses &= record["loss"] == other["loss"] and record["lr"] == other["lr"]
            if row.exact and record["ids"] != other["ids"]:
                row.faults.append(f"batch {record['batch']}: other samples or another order")
        final = self.newest(name)
        row.checkpoint_bytes = final.path.stat().st_size
        row.bitwise = same_losses and final.document["hashes"] == reference.document["hashes"]
        if row.exact and not row.bitwise:
            differing = [
                tensor
                for tensor, value in reference.document["hashes"].items()
                if final.document["hashes"].get(tensor) != value
            ]
            row.faults.append(f"not bitwise: losses {same_losses}, {len(differing)} tensors differ")
        if row.loss_error > RELATIVE:
            row.faults.append(f"losses are {row.loss_error:.1e} apart")
        if row.samples_lost_or_repeated:
            row.faults.append(f"{row.samples_lost_or_repeated} samples lost or repeated")
        trained = 4 * sum(final.tensor(n).numel() for n in final.names if n.startswith(WEIGHTS))
        if not 3 * trained < row.checkpoint_bytes < 3 * trained + 100_000:
            row.faults.append(f"{row.checkpoint_bytes} bytes for {trained // 4} trained weights")
        row.ok = not row.faults
        return row

    def kill(self, row: Row, where: str) -> Row:
        """Disturb by SIGKILL: `where` as recorded_train.py's KILL, or `tree` for every process."""
        name = row.name.replace(" ", "-").replace("://", "")
        self.yaml(name)
        if where.startswith("tree:"):
            gate = self.folder / f"{name}-gate"
            gate.mkdir()
            first = self.start(
                name,
                row.ranks[0],
                row.parallelism[0],
                dropout=row.exact,
                GATE=f"{where[5:]}:{gate}",
            )
            await_file(gate / "reached", first)
            kill_tree(first)
            codes = [first.wait()]
            allowed = [-signal.SIGKILL]
        else:
            first = self.start(
                name, row.ranks[0], row.parallelism[0], dropout=row.exact, KILL=where
            )
            codes = [self.finish(first)]
            allowed = [256 - signal.SIGKILL]  # what the launcher makes of rank 0's
        return self._go_on(row, name, codes, allowed)

    def kill_often(self, row: Row, times: int) -> Row:
        """Kill every process of a run as soon as it has done some batch, again and again."""
        name = row.name.replace(" ", "-").replace("://", "")
        self.yaml(name, max_duration=f"{row.batches}ba")
        points = sorted(random.sample(range(2, row.batches - 10), times))
        row.name += f" ({', '.join(map(str, points))})"
        codes = []
        for point in points:
            process = self.start(name, row.ranks[0], row.parallelism[0], dropout=True)
            while process.poll() is None and self._done(name) < point:
                time.sleep(0.02)
            kill_tree(process)
            codes.append(process.wait())
        return self._go_on(row, name, codes, [-signal.SIGKILL] * times)

    def preempt(self, row: Row, batch: int) -> Row:
        """Disturb by SIGTERM in a batch: the run must save after it and exit with 75."""
        name = row.name.replace(" ", "-").replace("://", "")
        self.yaml(name)
        first = self.start(
            name, row.ranks[0], row.parallelism[0], dropout=row.exact, TERM_AT=str(batch)
        )
        codes = [self.finish(first)]
        if (last := self.records(name)[-1]["batch"]) != batch + 1:
            row.faults.append(f"stopped after batch {last}, not {batch + 1}")
        if (saved := self.newest(name).document["timestamp"]["batch"]) != batch + 1:
            row.faults.append(f"saved after batch {saved}, not {batch + 1}")
        return self._go_on(row, name, codes, [75])

    def outage(self, row: Row, batch: int, seconds: float | None, *, reading: bool = True) -> Row:
        """Take the store away before a batch, for `seconds` or (None) for longer than the run
        waits. Without `reading`, shards come from a folder and only saving meets the outage."""
        name = row.name.replace(" ", "-").replace("://", "")
        changes: dict[str, Any] = {} if seconds else {"store_timeout": 3}
        if not reading:
            data = {"local": str(self.folder / "mds" / "train"), "shuffle": True, "predownload": 8}
            changes["train_loader"] = {"dataset": data, "num_workers": 2}
        self.yaml(name, **changes)
        gate = self.folder / f"{name}-gate"
        gate.mkdir()
        first = self.start(
            name, row.ranks[0], row.parallelism[0], dropout=row.exact, GATE=f"{batch}:{gate}"
        )
        await_file(gate / "reached", first)
        self.server.kill()
        (gate / "go").touch()
        if seconds:
            timer = threading.Timer(seconds, self.server.start)
            timer.start()
            codes = [self.finish(first)]
            timer.join()
            row.seconds_to_new_batch = longest_pause(self.records(name))
            return self.judge(row, name, codes, [])
        codes = [self.finish(first)]
        self.server.start()
        if "the store was away for 3 s" not in (self.folder / f"{name}.log").read_text():
            row.faults.append("the error does not say that the store was away")
        return self._go_on(row, name, codes, [1])

    def _go_on(self, row: Row, name: str, codes: list[int], allowed: list[int]) -> Row:
        done = self._done(name)
        started = time.time()
        codes.append(
            self.finish(self.start(name, row.ranks[1], row.parallelism[1], dropout=row.exact))
        )
        new = [r["time"] for r in self.records(name) if r["time"] > started and r["batch"] > done]
        row.seconds_to_new_batch = min(new) - started if new else float("nan")
        return self.judge(row, name, codes, allowed)

    def _done(self, name: str) -> int:
        return max((record["batch"] for record in self.records(name)), default=0)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL a launcher, its ranks, their workers and trackers, as a machine that is gone does."""
    os.killpg(process.pid, signal.SIGKILL)


def await_file(path: Path, process: subprocess.Popen[str]) -> None:
    """Return when a run has made a file; raise where it ends before."""
    while not path.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before {path.name}")
        time.sleep(0.02)


def longest_pause(records: list[dict[str, Any]]) -> float:
    """Most seconds between two batches."""
    times = [record["time"] for record in records]
    return max(later - earlier for earlier, later in pairwise(times))


Disturbance = Callable[[Bench, Row], Row]


def matrix(world_sizes: list[int], quick: bool) -> Iterator[tuple[Row, Disturbance]]:
    """The rows, each with what to do for it."""
    everything = f"tree:{EPOCH + 3}"
    moments = {
        "before the first checkpoint": "0:2:after_forward",
        "in the middle of an epoch": "0:6:after_train_batch",
        "at an epoch's last batch": f"0:{EPOCH}:batch_end",
        "at an epoch's end": f"0:{EPOCH}:epoch_checkpoint",
        "in the second epoch": f"0:{EPOCH + 6}:batch_start",
        "with all its processes": everything,
    }
    ways = [(n, "replicate") for n in world_sizes] + [(n, "shard") for n in world_sizes if n > 1]
    for ranks, parallelism in ways:
        label = f"{parallelism} {ranks}" if ranks > 1 else "one process"
        for moment, where in moments.items():
            if not quick or (ranks == 1 and where == everything):
                row = Row(f"kill {moment}, {label}", (ranks, ranks), (parallelism, parallelism))
                yield row, lambda bench, row, where=where: bench.kill(row, where)
        if not quick or parallelism == "shard":
            row = Row(f"SIGTERM, {label}", (ranks, ranks), (parallelism, parallelism))
            yield row, lambda bench, row: bench.preempt(row, EPOCH + 2)
    changes = [
        ((1, n), ("replicate", parallelism)) for n, parallelism in ways if n > 1 and not quick
    ]
    changes += [((n, 1), (parallelism, "replicate")) for n, parallelism in ways if n > 1]
    for ranks, parallelisms in changes[:1] if quick else changes:
        name = f"kill, {parallelisms[0]} {ranks[0]} then {parallelisms[1]} {ranks[1]}"
        row = Row(name, ranks, parallelisms, exact=False)
        yield row, lambda bench, row: bench.kill(row, everything)
    outages: list[float | None] = [1, None] if quick else [1, 8, 30, None]
    one = ((1, 1), ("replicate", "replicate"))
    for seconds in outages:
        name = f"store away for {seconds:.0f} s" if seconds else "store away for good"
        yield Row(name, *one), lambda bench, row, seconds=seconds: bench.outage(row, 3, seconds)
    row = Row("kill with all its processes, gs://", *one, store="gs")
    yield row, lambda bench, row: bench.kill(row, everything)
    if not quick:
        row = Row("store away for 8 s while saving", *one)
        yield row, lambda bench, row: bench.outage(row, 3, 8, reading=False)
        row = Row("store away for good while saving", *one)
        yield row, lambda bench, row: bench.outage(row, 3, None, reading=False)
        row = Row("store away for 8 s, gs://", *one, store="gs")
        yield row, lambda bench, row: bench.outage(row, 3, 8)
        row = Row("200 batches killed ten times", *one, batches=200)
        yield row, lambda bench, row: bench.kill_often(row, 10)


def run(world_sizes: list[int], quick: bool, folder: Path) -> list[Row]:
    """Run the matrix, printing each row as it is done."""
    servers: dict[str, S3Server | GCSServer] = {}
    for scheme, kind in (("s3", S3Server), ("gs", GCSServer)):
        (folder / f"{scheme}-server").mkdir()
        servers[scheme] = kind(folder / f"{scheme}-server")
        os.environ.update(servers[scheme].env)
        servers[scheme].start()
    rows = []
    try:
        benches = {scheme: Bench(folder / scheme, server) for scheme, server in servers.items()}
        for row, disturb in matrix(world_sizes, quick):
            try:
                done = disturb(benches[row.store], row)
            except RuntimeError as error:
                row.faults.append(str(error))
                done = row
            rows.append(done)
            print_row(done)
    finally:
        for server in servers.values():
            server.kill()
    return rows


def print_row(row: Row) -> None:
    """Print a line of the table, and what is wrong below it."""
    verdict = "ok" if row.ok else "FAILS"
    kind = "bitwise" if row.bitwise else f"losses to {row.loss_error:.0e}"
    print(
        f"{verdict:<6} {row.name:<55} {kind:<17} {row.samples_lost_or_repeated:>3} lost or repeated"
        f"  {row.seconds_to_new_batch:5.1f} s to a new batch  {row.checkpoint_bytes / 1e3:7.1f} kB",
        flush=True,
    )
    for fault in row.faults:
        print(f"       {fault}", flush=True)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, nargs="+", default=[1, 2], help="ranks to run on")
    parser.add_argument("--quick", action="store_true", help="a few rows of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the ten points of killing")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    random.seed(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="resume-"))
    rows = run(options.world_size, options.quick, folder)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} rows hold what is promised")
    if not failed:
        shutil.rmtree(folder)
    else:
        print(f"logs are in {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
