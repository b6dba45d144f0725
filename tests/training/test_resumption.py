"""Killed, preempted, cut off: the small matrix of `benchmarks/resume.py`, in real runs."""

import pytest

from benchmarks.disturbed_runs import Bench
from benchmarks.resume import matrix
from benchmarks.resume_rows import Row
from store_server import SERVERS


@pytest.fixture(scope="module")
def benches(request, tmp_path_factory):
    servers = {kind: request.getfixturevalue(name) for kind, name in SERVERS.items()}
    return {name: Bench(tmp_path_factory.mktemp(name), s) for name, s in servers.items()}


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize(
    ("row", "disturb"), matrix([1, 2], quick=True), ids=lambda part: getattr(part, "name", "")
)
def test_a_disturbed_run_ends_as_the_undisturbed_one(benches, row: Row, disturb):
    done = disturb(benches[row.store], row)
    assert not done.faults, "\n".join(done.faults)
    assert done.bitwise or not done.exact
