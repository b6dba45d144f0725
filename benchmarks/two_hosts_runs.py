"""Runs on two simulated hosts that are disturbed, started again and judged.

What `two_hosts.py` makes its table of. Shards and checkpoints are in an S3 server on the bridge
between the hosts. A run is compared with an undisturbed one of as many ranks on one host.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.disturbed_runs import LEG_SECONDS, ROOT, Bench, await_file, longest_pause
from benchmarks.resume_rows import BATCHES, Row
from benchmarks.simulated_hosts import BRIDGE_ADDRESS, TIED, Host, SimulatedHosts
from s3_server import S3Server

DIST_TIMEOUT = 20
ORPHAN_SECONDS = 10
"""How long a process may outlive the launcher that it belongs to."""


@dataclass
class HostsRow(Row):
    """One disturbed run on two hosts."""

    seconds: dict[str, float] = field(default_factory=dict)
    """What was timed."""
    codes: list[list[int]] = field(default_factory=list)
    """Exit codes of every start, by host."""
    said: list[str] = field(default_factory=list)
    """The error lines that the user saw, by host."""

    @property
    def ranks_per_host(self) -> int:
        """On each of two hosts."""
        return self.ranks[0] // 2


class Leg:
    """One start of the command, on one host or more."""

    def __init__(self) -> None:
        self.processes: dict[Host, subprocess.Popen[bytes]] = {}
        self.logs: dict[Host, Path] = {}
        self.ended: dict[Host, float] = {}
        """When a host's launcher has ended (`time.monotonic`)."""
        self._watchers: dict[Host, threading.Thread] = {}

    def add(self, host: Host, process: subprocess.Popen[bytes], log: Path) -> None:
        """Note what was started on a host."""

        def watch() -> None:
            process.wait()
            self.ended[host] = time.monotonic()

        self.processes[host], self.logs[host] = process, log
        self._watchers[host] = threading.Thread(target=watch, daemon=True)
        self._watchers[host].start()

    def finish(self) -> None:
        """Wait for all launchers.

        Raises:
            RuntimeError: One hangs; it was killed.
        """
        deadline = time.monotonic() + LEG_SECONDS
        for watcher in self._watchers.values():
            watcher.join(max(deadline - time.monotonic(), 0))
        hanging = [host for host, watcher in self._watchers.items() if watcher.is_alive()]
        for host in hanging:
            host.kill_all()
            self._watchers[host].join()
        if hanging:
            names = ", ".join(host.name for host in hanging)
            raise RuntimeError(f"{names} hung for {LEG_SECONDS} s")

    def await_line(self, host: Host, words: str) -> None:
        """Return when a host's run has logged some words; raise where it ends before."""
        while words not in self.logs[host].read_text():
            if self.processes[host].poll() is not None:
                raise RuntimeError(f"{host.name} ended and never said {words!r}")
            time.sleep(0.02)

    def codes(self) -> list[int]:
        """Exit codes of the launchers, by host."""
        return [process.returncode for process in self.processes.values()]

    def errors(self) -> dict[Host, list[str]]:
        """The lines in which each host's run says what went wrong."""
        return {
            host: [line for line in path.read_text().splitlines() if line.startswith("error on")]
            for host, path in self.logs.items()
        }

    def tracebacks(self) -> list[str]:
        """The hosts whose runs printed a trace of Python's."""
        return [host.name for host, path in self.logs.items() if "Traceback" in path.read_text()]


class HostsBench(Bench):
    """A `Bench` whose runs may also be on simulated hosts.

    Args:
        folder: An empty folder that all hosts see.
        server: On the bridge.
        hosts: Where its runs may be.
    """

    def __init__(self, folder: Path, server: S3Server, hosts: Sequence[Host]) -> None:
        super().__init__(folder, server, private=private_folder(folder))
        self.hosts = hosts
        self._legs = 0

    def placed(self, *command: str | Path) -> list[str]:
        """The run on one host that others are compared with is on a simulated one too."""
        return self.hosts[0].command(*command)

    def begin(
        self,
        row: HostsRow,
        *,
        hosts: Sequence[Host] | None = None,
        only: Host | None = None,
        master: str = "host0:29500",
        **environment: str,
    ) -> Leg:
        """Start a row's run on the hosts, or go on with it.

        Args:
            row: Its yaml must have been written.
            hosts: Where; everywhere by itself.
            only: The host that `environment` is for; all of them by itself.
            master: Address and port that the ranks are to meet at.
            environment: What `recorded_train.py` is told.
        """
        self._legs += 1
        leg = Leg()
        address, port = master.split(":")
        name, ranks = row.run_name, row.ranks_per_host
        for host in hosts or self.hosts:
            index = self.hosts.index(host)
            path = self.folder / f"{self._legs:02}-{name}-{host.name}.log"
            told = environment if only in (None, host) else {}
            with path.open("wb") as log:
                process = subprocess.Popen(
                    host.command(
                        *(Path(sys.executable).with_name("composer"), "-n", str(ranks)),
                        *("--world_size", str(row.ranks[0]), "--node_rank", str(index)),
                        *("--base_rank", str(index * ranks)),
                        *("--master_addr", address, "--master_port", port),
                        ROOT / "benchmarks" / "recorded_train.py",
                        self.folder / f"{name}.yaml",
                    ),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment(name, dropout=True, **told),
                )
            leg.add(host, process, path)
        return leg

    def pull_cable_in_batch(self, row: HostsRow, host: Host, batch: int, **environment: str) -> Leg:
        """Start a row's run, or go on with it, and pull a host's cable before a batch."""
        gate = self.folder / f"{row.run_name}-gate-{batch}"
        gate.mkdir()
        leg = self.begin(row, GATE=f"{batch}:{gate}", **environment)
        await_file(gate / "reached", leg.processes[host])
        host.pull_cable()
        (gate / "go").touch()
        return leg

    def end(
        self, row: HostsRow, leg: Leg, expected: Sequence[int | Sequence[int]]
    ) -> dict[Host, float]:
        """Wait for a leg, and note exit codes and processes that outlive it.

        Args:
            row: Where to note them.
            leg: What to wait for.
            expected: Exit codes of the hosts; a host may have several to choose from.

        Returns:
            When each host's launcher has ended.
        """
        leg.finish()
        row.codes.append(leg.codes())
        allowed = [(codes,) if isinstance(codes, int) else codes for codes in expected]
        if not all(code in codes for code, codes in zip(leg.codes(), allowed, strict=True)):
            row.faults.append(f"exit codes {leg.codes()}, expected {list(expected)}")
            for path in leg.logs.values():
                row.faults += path.read_text().splitlines()[-15:]
        for host in leg.processes:
            if left := host.await_idle(ORPHAN_SECONDS):
                row.faults.append(f"{host.name}: {list(left.values())} outlive the run")
                host.kill_all()
        row.seconds["to the last process"] = time.monotonic() - max(leg.ended.values())
        return leg.ended

    def expect_error(self, row: HostsRow, leg: Leg, host: Host, *words: str) -> None:
        """Note where not each rank of a host says in one line, without a trace, what is wrong."""
        errors = leg.errors()[host]
        row.said += [f"{host.name}: {line}" for line in errors]
        if not 1 <= len(errors) <= row.ranks_per_host:
            row.faults.append(f"{host.name} has {len(errors)} error lines")
        row.faults += [
            f"{host.name} does not say {word!r}" for word in words if word not in "".join(errors)
        ]
        if host.name in leg.tracebacks():
            row.faults.append(f"{host.name} prints a trace")

    def go_on(self, row: HostsRow) -> HostsRow:
        """Start the same command again on all hosts, and judge what it ends with."""
        done = self._done(row.run_name)
        started = time.time()
        leg = self.begin(row)
        self.end(row, leg, [0] * len(self.hosts))
        second = [r for r in self.records(row.run_name) if r["time"] > started]
        if not second or second[0]["batch"] == 1:
            row.faults.append("the second start did not go on from a checkpoint")
        new = [record["time"] for record in second if record["batch"] > done]
        row.seconds_to_new_batch = min(new) - started if new else float("nan")
        return self.judge_hosts(row)

    def judge_hosts(self, row: HostsRow) -> HostsRow:
        """Compare a run with an undisturbed one.

        With a rank a host that is one of two ranks on one host. With more it is on both hosts:
        streaming deals a batch out to nodes first, and random numbers are a rank's.
        """
        if row.ranks_per_host == 1:
            expected, reference = self.undisturbed(2, row.parallelism[0], True, row.batches)
        else:
            calm = replace(row, name=f"{row.name}, undisturbed", codes=[], faults=[], seconds={})
            self.write_yaml(calm)
            self.end(calm, self.begin(calm), [0] * len(self.hosts))
            row.faults += calm.faults
            expected, reference = self.records(calm.run_name), self.newest(calm.run_name)
        row.compare_batches(self.records(row.run_name), expected)
        row.compare_ends(self.newest(row.run_name), reference)
        row.ok = not row.faults
        return row

    def write_yaml(self, row: HostsRow, **changes: Any) -> None:
        """Write the yaml of a row's run."""
        settings = {"dist_timeout": DIST_TIMEOUT, "max_duration": f"{row.batches}ba"}
        self.yaml(row.run_name, **{**settings, "parallelism": row.parallelism[0], **changes})

    def pause(self, row: HostsRow) -> float:
        """Most seconds between two batches of a row's run."""
        return longest_pause(self.records(row.run_name))


class BridgeServer(S3Server):
    """An S3 server that ends with the thread that started it, as the hosts do."""

    def _command(self) -> list[str | Path]:
        return [*TIED, *super()._command()]


def private_folder(folder: Path) -> Path:
    """The folder in which each host sees files of its own."""
    return folder / "own"


def two_hosts_row(
    name: str, parallelism: str = "replicate", batches: int = BATCHES, ranks_per_host: int = 1
) -> HostsRow:
    """A row of a run on both hosts, before the disturbance and after it."""
    ranks = 2 * ranks_per_host
    return HostsRow(name, (ranks, ranks), (parallelism, parallelism), batches)


@contextmanager
def hosts_bench(folder: Path) -> Iterator[HostsBench]:
    """Two hosts, an S3 server between them, towers and shards.

    Args:
        folder: An empty folder.
    """
    with ExitStack() as stack:
        hosts = stack.enter_context(SimulatedHosts(2, folder, private_folder(folder)))
        (folder / "s3-server").mkdir()
        server = BridgeServer(folder / "s3-server", BRIDGE_ADDRESS)
        stack.callback(server.kill)
        server.start()
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield HostsBench(folder, server, hosts)
