"""The local engine: results, errors, and what becomes of workers."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from killed_runs import wait_for_fifo

from convert import ConversionError
from convert.engine import Later, LocalEngine, Tell

TREE = Path(__file__).parents[2]


def square(number: int, tell: Tell) -> tuple[int, int]:
    tell(number)
    return number * number, os.getpid()


def refuse_three(number: int, tell: Tell) -> int:
    if number == 3:
        raise ConversionError("three is not a number")
    return number


def die_at_three(number: int, tell: Tell) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def say_and_stay(path: str, number: int, tell: Tell) -> None:
    with open(path, "w") as fifo:
        fifo.write(f"{os.getpid()}\n")
    signal.pause()


class Kept:
    """Counts how often it was called since it was sent to its process."""

    calls = 0

    def __call__(self, task: int, tell: Tell) -> int:
        self.calls += 1
        return self.calls


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_and_messages(workers: int) -> None:
    heard: list[int] = []
    results = dict(LocalEngine(workers).map(square, iter(range(20)), heard.append))
    assert {place: value for place, (value, _) in results.items()} == {
        number: number * number for number in range(20)
    }
    assert sorted(heard) == list(range(20))
    pids = {pid for _, pid in results.values()}
    assert (pids == {os.getpid()}) == (workers == 1)
    assert len(pids) <= workers


def test_one_task_needs_no_process() -> None:
    assert list(LocalEngine(4).map(square, [3])) == [(0, (9, os.getpid()))]
    assert list(LocalEngine(4).map(square, [])) == []


def test_tasks_are_taken_as_there_is_somebody_to_do_them() -> None:
    taken: list[int] = []
    tasks = (taken.append(number) or number for number in range(100))
    with closing(LocalEngine(2).map(square, tasks)) as results:
        next(results)
        assert len(taken) <= 4


def test_a_worker_keeps_its_function() -> None:
    calls = [value for _, value in LocalEngine(2).map(Kept(), range(10))]
    assert sum(1 for value in calls if value == 1) <= 2
    assert max(calls) >= 5


class Slow:
    """Its results count later: each once the next task is begun, and that of the last anyway."""

    def __init__(self, refuse: int = -1) -> None:
        self.refuse = refuse

    def __call__(self, task: int, tell: Tell) -> Later[int]:
        if task == self.refuse:
            raise ConversionError(f"{task} is refused")
        for _ in range(3):
            tell(task)
        return Later(10 * task, [start(0.05)])


def start(seconds: float, error: Exception | None = None) -> Future[None]:
    """Something that goes on by itself for some seconds."""
    future: Future[None] = Future()
    end = partial(future.set_exception, error) if error else partial(future.set_result, None)
    threading.Timer(seconds, end).start()
    return future


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_that_count_later(workers: int) -> None:
    heard: list[int] = []
    results = dict(LocalEngine(workers).map(Slow(), range(20), heard.append))
    assert results == {number: 10 * number for number in range(20)}
    assert len(heard) == 60


class Overlap:
    """Says when a task is begun while the result of the one before it still waits."""

    before: Future[None] | None = None

    def __init__(self, fifo: Path) -> None:
        self.fifo = fifo
        """A result waits for a byte of it."""

    def __call__(self, task: int, tell: Tell) -> Later[int]:
        if self.before is not None and not self.before.done():
            tell("overlap")
        self.before = Future()
        threading.Thread(target=self.settle, args=(self.before,), daemon=True).start()
        return Later(task, [self.before])

    def settle(self, future: Future[None]) -> None:
        with self.fifo.open("rb", buffering=0) as fifo:
            if wait([fifo], timeout=60):  # or there was no overlap
                fifo.read(1)
        future.set_result(None)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_next_task_is_begun_meanwhile(tmp_path: Path, workers: int) -> None:
    path, heard = tmp_path / "fifo", []
    os.mkfifo(path)
    fifo = os.open(path, os.O_RDWR)

    def hear(message: str) -> None:
        heard.append(message)
        if len(heard) == workers:
            os.write(fifo, bytes(2 * workers))

    assert len([*LocalEngine(workers).map(Overlap(path), range(2 * workers), hear)]) > 1
    os.close(fifo)
    assert heard == ["overlap"] * workers


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_done_before_an_error_is_given(workers: int) -> None:
    mapped = LocalEngine(workers).map(Slow(refuse=11), range(12))
    results: list[int] = []
    with pytest.raises(ConversionError, match="11 is refused"):
        results.extend(place for place, _ in mapped)
    # Another worker loses what it has under way: one task, and one whose result still waits.
    assert len(results) >= 11 - 2 * (workers - 1)


def fail_later(number: int, tell: Tell) -> Later[int]:
    return Later(number, [start(0.01, ConversionError("the disk is full"))])


@pytest.mark.parametrize("workers", [1, 2])
def test_what_fails_later_is_raised_here(workers: int) -> None:
    with pytest.raises(ConversionError, match="the disk is full"):
        list(LocalEngine(workers).map(fail_later, range(3)))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_here(workers: int) -> None:
    with pytest.raises(ConversionError, match="three is not a number"):
        list(LocalEngine(workers).map(refuse_three, range(10)))


def test_a_worker_that_dies_is_an_error() -> None:
    with pytest.raises(ConversionError, match=r"worker process died \(killed by SIGKILL\)"):
        list(LocalEngine(2).map(die_at_three, range(10)))


def test_no_workers_are_refused() -> None:
    with pytest.raises(ConversionError, match="workers is 0"):
        LocalEngine(0)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_workers_end_with_their_parent(tmp_path: Path, name: str) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fifo = os.open(path, os.O_RDWR)  # so that it stays open between two that write
    script = (
        "from functools import partial; from convert.engine import LocalEngine; "
        "from test_convert_engine import say_and_stay\n"
        f"if __name__ == '__main__': list(LocalEngine(2).map(partial(say_and_stay, {str(path)!r}),"
        " range(4)))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{TREE}:{Path(__file__).parent}"},
        stderr=subprocess.PIPE,
    )
    said = b""
    while said.count(b"\n") < 2:
        said += wait_for_fifo(fifo, run)
    os.close(fifo)
    workers = [os.pidfd_open(int(pid)) for pid in said.split()]
    run.send_signal(getattr(signal, name))
    _, error = run.communicate(timeout=60)
    assert (b"KeyboardInterrupt" in error) == (name == "SIGINT")
    assert error.count(b"Traceback") <= 1  # no word of the workers
    while workers:
        ended = wait(workers, timeout=60)
        assert ended, "a worker outlives its parent"
        workers = [worker for worker in workers if worker not in ended]
