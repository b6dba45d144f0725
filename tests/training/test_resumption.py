"""Killed, preempted, cut off: the small matrix of `benchmarks/resume.py`, in real runs."""

import pytest

from benchmarks.resume import Bench, Row, matrix


@pytest.fixture(scope="module")
def bench(s3_server, tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("resume"), s3_server)


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize(
    ("row", "disturb"), matrix([1, 2], quick=True), ids=lambda part: getattr(part, "name", "")
)
def test_a_disturbed_run_ends_as_the_undisturbed_one(bench: Bench, row: Row, disturb):
    done = disturb(bench, row)
    assert not done.faults, "\n".join(done.faults)
    assert done.bitwise or not done.exact
