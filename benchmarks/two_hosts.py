"""Claim: over several hosts a run ends as on one, and where it cannot go on it says so and ends.

Two hosts in network namespaces, a bridge between them and a real S3 server on it, with shards and
checkpoints. Every row is a real run of `vlm_composer/train.py` through the Composer launcher on
both hosts, with tiny towers, two loader workers a rank, accumulation, dropout and evaluations in
the middle of epochs. A row's final weights, moments, random state, and every loss and sample must
be bitwise those of an undisturbed run with two ranks on one host. Needs root and `ip`.

    python benchmarks/two_hosts.py [--quick] [--json FILE]

Prints a table and exits 1 where a row falls short.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.resume_rows import conclude
from benchmarks.simulated_hosts import Host, why_not
from benchmarks.two_hosts_runs import (
    DIST_TIMEOUT,
    HostsBench,
    HostsRow,
    hosts_bench,
    two_hosts_row,
)

CUT_SECONDS = 5.0
TIMEOUT_MARGIN = 25.0
"""Seconds that a host may take to end once it has waited for `dist_timeout`: ending its loaders'
workers takes 5 on a quiet machine."""
KILL_SECONDS = 15.0
"""Seconds in which the others must have ended when a rank was killed."""
AT = 9
"""The batch that is disturbed: two checkpoints are before it."""
KILLED, TERMINATED = 256 - signal.SIGKILL, 256 - signal.SIGTERM
"""What the launcher makes of a rank that was killed, and of one that it ended itself."""

Disturbance = Callable[[HostsBench, HostsRow], HostsRow]


def matrix(quick: bool) -> Iterator[tuple[HostsRow, Disturbance]]:
    """The rows, each with what to do for it."""
    yield two_hosts_row("undisturbed"), undisturbed
    if not quick:
        yield two_hosts_row("undisturbed, shard", "shard"), undisturbed
    who = {1: "", 0: " (the one that saves)"}
    for index in (1,) if quick else who:
        of = f"of host {index}{who[index]}"
        yield (
            two_hosts_row(f"cable {of} pulled for {CUT_SECONDS:.0f} s"),
            lambda bench, row, i=index: cut_for_a_while(bench, row, bench.hosts[i]),
        )
        yield (
            two_hosts_row(f"cable {of} pulled for good"),
            lambda bench, row, i=index: cut_for_good(bench, row, bench.hosts[i]),
        )
        yield (
            two_hosts_row(f"rank {of} killed"),
            lambda bench, row, i=index: kill_a_rank(bench, row, bench.hosts[i]),
        )
        yield (
            two_hosts_row(f"SIGTERM {of} alone"),
            lambda bench, row, i=index: preempt_one(bench, row, bench.hosts[i]),
        )
    yield two_hosts_row("a host that never comes, a wrong port"), never_comes
    if not quick:
        yield (
            two_hosts_row("rank of host 1 killed, two ranks on each", ranks_per_host=2),
            lambda bench, row: kill_a_rank(bench, row, bench.hosts[1]),
        )
        yield two_hosts_row("hosts that take their own names for 127.0.1.1"), named_loopback


def undisturbed(bench: HostsBench, row: HostsRow) -> HostsRow:
    """Nothing happens."""
    bench.write_yaml(row)
    bench.end(row, bench.begin(row), [0, 0])
    return bench.judge_hosts(row)


def cut_for_a_while(bench: HostsBench, row: HostsRow, host: Host) -> HostsRow:
    """Pull a cable and put it back while no collective operation has timed out yet."""
    bench.write_yaml(row)
    leg = bench.pull_cable_in_batch(row, host, AT)
    time.sleep(CUT_SECONDS)  # the disturbance
    host.plug_cable()
    bench.end(row, leg, [0, 0])
    row.seconds["longest pause"] = bench.pause(row)
    if not CUT_SECONDS <= row.seconds["longest pause"] < DIST_TIMEOUT:
        row.faults.append(f"paused for {row.seconds['longest pause']:.1f} s")
    return bench.judge_hosts(row)


def cut_for_good(bench: HostsBench, row: HostsRow, host: Host) -> HostsRow:
    """Pull a cable; the next start finds it mended."""
    bench.write_yaml(row)
    leg = bench.pull_cable_in_batch(row, host, AT)
    cut = time.monotonic()
    ended = bench.end(row, leg, [1, 1])
    host.plug_cable()
    _note_ends(row, cut, ended, DIST_TIMEOUT + TIMEOUT_MARGIN)
    for each in bench.hosts:
        bench.expect_error(row, leg, each, "lost contact", "start the same command on every node")
    return bench.go_on(row)


def kill_a_rank(bench: HostsBench, row: HostsRow, host: Host) -> HostsRow:
    """SIGKILL the rank of a host in the middle of a batch."""
    bench.write_yaml(row)
    index = bench.hosts.index(host)
    rank = index * row.ranks_per_host
    leg = bench.begin(row, KILL=f"{rank}:{AT}:after_train_batch")
    other = bench.hosts[1 - index]
    # One that ends later than its neighbour is ended by their launcher.
    failed = [1] if row.ranks_per_host == 1 else [1, TERMINATED]
    ended = bench.end(row, leg, [KILLED if each == host else failed for each in bench.hosts])
    row.seconds["until the other ended"] = ended[other] - ended[host]
    if row.seconds["until the other ended"] > KILL_SECONDS:
        row.faults.append(f"the other host took more than {KILL_SECONDS:.0f} s")
    bench.expect_error(row, leg, other, "lost contact", "start the same command on every node")
    return bench.go_on(row)


def preempt_one(bench: HostsBench, row: HostsRow, host: Host) -> HostsRow:
    """SIGTERM to the launcher of one host: both must save after that batch and exit with 75."""
    bench.write_yaml(row)
    leg = bench.begin(row, only=host, TERM_AT=str(AT))
    bench.end(row, leg, [75, 75])
    if (saved := bench.newest(row.run_name).document["timestamp"]["batch"]) != AT + 1:
        row.faults.append(f"saved after batch {saved}, not {AT + 1}")
    return bench.go_on(row)


def never_comes(bench: HostsBench, row: HostsRow) -> HostsRow:
    """Rank 0 waits for a host that was sent to another port."""
    bench.write_yaml(row)
    first, second = bench.hosts
    waiting = bench.begin(row, hosts=[first])
    lost = bench.begin(row, hosts=[second], master="host0:29999")
    waiting.await_line(first, f"Waiting up to {DIST_TIMEOUT} s for 2 ranks at host0:29500")
    started = time.monotonic()
    lost.await_line(second, "Still looking for rank 0 at host0:29999")  # says it after 15 s
    looked = time.monotonic()
    _note_ends(row, started, bench.end(row, waiting, [1]), DIST_TIMEOUT + TIMEOUT_MARGIN)
    _note_ends(row, looked, bench.end(row, lost, [1]), DIST_TIMEOUT + TIMEOUT_MARGIN)
    bench.expect_error(row, waiting, first, "host0:29500", "only 1 of 2 ranks came", "--world_size")
    bench.expect_error(row, lost, second, "rank 0 at host0:29999", "--master_port", "refused")
    row.ok = not row.faults
    return row


def named_loopback(bench: HostsBench, row: HostsRow) -> HostsRow:
    """As Debian has it: gloo offers 127.0.1.1 to the others, until it is told an interface."""
    bench.write_yaml(row)
    for host in bench.hosts:
        host.rename_itself("127.0.1.1")
    try:
        leg = bench.begin(row)
        bench.end(row, leg, [1, 1])
        for each in bench.hosts:
            bench.expect_error(row, leg, each, "could not join", "GLOO_SOCKET_IFNAME")
        told = bench.begin(row, GLOO_SOCKET_IFNAME="eth0")
        bench.end(row, told, [0, 0])
    finally:
        for host in bench.hosts:
            host.rename_itself(host.address)
    return bench.judge_hosts(row)


def _note_ends(row: HostsRow, start: float, ended: dict[Host, float], limit: float) -> None:
    for host, end in ended.items():
        row.seconds[f"until {host.name} ended"] = end - start
        if end - start > limit:
            row.faults.append(f"{host.name} took more than {limit:.0f} s")


def run(quick: bool, folder: Path) -> list[HostsRow]:
    """Run the matrix, printing each row as it is done."""
    rows = []
    with hosts_bench(folder) as bench:
        for row, disturb in matrix(quick):
            started = time.monotonic()
            try:
                disturb(bench, row)
            except (RuntimeError, AssertionError) as error:
                row.faults.append(f"{type(error).__name__}: {error}")
                for host in bench.hosts:
                    host.plug_cable()
                    host.kill_all()
            row.seconds["all"] = time.monotonic() - started
            rows.append(row)
            print_row(row)
    return rows


def print_row(row: HostsRow) -> None:
    """Print a line of the table, what was timed and said, and what is wrong."""
    kind = "bitwise" if row.bitwise else "-"
    codes = ", then ".join("/".join(map(str, leg)) for leg in row.codes)
    verdict = "ok" if row.ok else "FAILS"
    print(f"{verdict:<6} {row.name:<52} {kind:<8} exit codes {codes}", flush=True)
    timed = {**row.seconds, "to a new batch": row.seconds_to_new_batch}
    times = ", ".join(f"{name} {value:.1f} s" for name, value in timed.items() if value)
    print(f"         {times}")
    for line in row.said:
        print(f"         {line}")
    for fault in row.faults:
        print(f"       ! {fault}", flush=True)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one row of each kind")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if reason := why_not():
        print(f"cannot simulate hosts here: {reason}", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="two-hosts-"))
    return conclude(run(options.quick, folder), folder, options.json)


if __name__ == "__main__":
    sys.exit(main())
