"""Two hosts with a network between them: what a cut or a kill does to a run, and what it does not.

`benchmarks/two_hosts.py` has every kind of disturbance by itself; here they follow on each other.
"""

import time

import pytest

from benchmarks.simulated_hosts import why_not
from benchmarks.two_hosts_runs import hosts_bench, two_hosts_row

pytestmark = [pytest.mark.slow, pytest.mark.s3]

KILLED = 247
"""What the launcher makes of a rank that got SIGKILL."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    if reason := why_not():
        pytest.skip(f"hosts need root, ip and namespaces: {reason}")
    with hosts_bench(tmp_path_factory.mktemp("hosts")) as bench:
        yield bench


def test_cut_and_killed_and_cut_off_it_ends_with_the_same_bits(bench):
    row = two_hosts_row("disturbed", batches=18)
    bench.write_yaml(row, dist_timeout=60)
    leg = bench.pull_cable_in_batch(row, bench.hosts[0], 3, KILL="1:9:after_train_batch")
    time.sleep(5)  # the disturbance
    bench.hosts[0].plug_cable()
    ended = bench.end(row, leg, [1, KILLED])
    assert not row.faults, row.faults
    assert 5 <= bench.pause(row) < 40, "the cut was not felt"
    assert ended[bench.hosts[0]] - ended[bench.hosts[1]] < 50, "it waited for dist_timeout"
    bench.expect_error(row, leg, bench.hosts[0], "lost contact", "a connection was closed")

    bench.write_yaml(row, dist_timeout=30)  # ranks that start beside other jobs need some
    leg = bench.pull_cable_in_batch(row, bench.hosts[1], 13)
    started = time.monotonic()
    ended = bench.end(row, leg, [1, 1])
    assert max(ended.values()) - started < 30 + 60
    bench.hosts[1].plug_cable()
    for host in bench.hosts:
        bench.expect_error(row, leg, host, "did not answer for 30 s", "start the same command")
    assert not row.faults, row.faults

    bench.write_yaml(row, dist_timeout=60)
    bench.go_on(row)
    assert row.ok, row.faults
    assert row.bitwise
