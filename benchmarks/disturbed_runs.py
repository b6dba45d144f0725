"""Runs of tiny towers over a real store that are disturbed, started again and judged.

What `resume.py` makes its table of. A run is compared with an undisturbed one: every loss, learning
rate and sample, and the final weights, moments and random state.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests' tiny towers and servers

from azure_server import AzureServer  # noqa: E402
from benchmarks.resume_rows import BATCHES, Row  # noqa: E402
from convert import convert_llava  # noqa: E402
from gcs_server import GCSServer  # noqa: E402
from s3_server import S3Server  # noqa: E402
from store_server import StoreServer  # noqa: E402
from tiny import save_tower, tiny_qwen3, tiny_siglip, write_pairs  # noqa: E402
from vlm_composer.training.checkpoint_file import CheckpointFile  # noqa: E402
from vlm_composer.training.checkpoint_folder import CheckpointFolder  # noqa: E402

SERVERS = {"s3": S3Server, "gs": GCSServer, "azure": AzureServer}
SAVE_EVERY = 4
"""Batches between two checkpoints."""
STORE_TIMEOUT = 60
LEG_SECONDS = 240


class Bench:
    """Towers, shards, a store, and the runs over them.

    Args:
        folder: An empty folder.
        server: A running store whose environment is set.
        dropout: Of the runs that draw random numbers.
        private: Where a run keeps what is its machine's own, its caches; `folder` by itself.
    """

    def __init__(
        self,
        folder: Path,
        server: StoreServer,
        dropout: float = 0.1,
        private: Path | None = None,
    ) -> None:
        self.folder, self.server, self.dropout = folder, server, dropout
        self._private = private or folder
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
            "local": str(self._private / name / "cache" / "train"),
            "predownload": 8,
        }
        settings = {
            "run_name": name,
            "run_folder": str(self._private / name),
            "vision_tower": {"name": str(self.folder / "siglip"), "dtype": "fp32"},
            "language_model": {"name": str(self.folder / "qwen3"), "dtype": "fp32"},
            "connector": {
                "resampler": {"num_latents": 4, "depth": 2, "num_heads": 2, "head_dim": 16},
                "projector": {"mlp_ratio": 2},
            },
            "max_seq_len": 64,
            "compile_blocks": False,  # each start of each run would wait for the compiler
            "train_loader": {"dataset": {**data, "shuffle": True}, "num_workers": 2},
            "eval_loader": {
                "dataset": {
                    "remote": f"{self._bucket}/mds/eval",
                    "local": str(self._private / name / "cache" / "eval"),
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
            self.placed(
                *(Path(sys.executable).with_name("composer"), "-n", str(ranks)),
                *(ROOT / "benchmarks" / "recorded_train.py", self.folder / f"{name}.yaml"),
                f"parallelism={parallelism}",
            ),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=self.environment(name, dropout=dropout, **environment),
        )

    def placed(self, *command: str | Path) -> list[str]:
        """What runs a command where this bench's runs on one host are."""
        return [str(part) for part in command]

    def environment(self, name: str, *, dropout: bool, **environment: str) -> dict[str, str]:
        """The environment of run `name`: this process's, what every run has, and more."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RECORD": str(self.folder / f"{name}.jsonl"),
            "DROPOUT": str(self.dropout if dropout else 0),
            **environment,
        }

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
        if codes[:-1] != allowed or codes[-1]:
            row.faults.append(f"exit codes {codes}, expected {[*allowed, 0]}")
            row.faults += (self.folder / f"{name}.log").read_text().splitlines()[-20:]
            return row
        row.compare_batches(self.records(name), expected)
        row.compare_ends(self.newest(name), reference)
        row.ok = not row.faults
        return row

    def kill(self, row: Row, where: str) -> Row:
        """Disturb by SIGKILL: `where` as recorded_train.py's KILL, or `tree` for every process."""
        name = row.run_name
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
        name = row.run_name
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
        name = row.run_name
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
        name = row.run_name
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
