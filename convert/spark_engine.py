"""Runs the tasks of a conversion on Spark: on this machine, or on a cluster.

A task is a Spark job of one task, and a thread here waits for it. So a partition that is finished
reaches the journal at once, not with the last of a wave; the slowest holds up no other; and as much
is in this process's memory as is under way.
"""

from __future__ import annotations

import os
import pickle
import secrets
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from pyspark import Broadcast, InheritableThread, SparkContext, cloudpickle
from pyspark.sql import SparkSession

from convert.engine import Later, Tell, tell_nobody
from convert.errors import ConversionError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 2
"""Tasks under way for each core that Spark has: nobody waits for this process, and a cluster that
grows on demand sees that there is more to do."""

_ROOT = Path(__file__).parent.parent


class SparkEngine:
    """Executors of a Spark session. What functions tell of their progress is dropped.

    Args:
        session: The session; None takes the active one, or makes one of the settings that
            spark-submit or spark-defaults.conf give (without any, of all cores of this machine).
    """

    def __init__(self, session: SparkSession | None = None) -> None:
        self._session = session

    def map(
        self,
        function: Callable[[Task, Tell], Result | Later[Result]],
        tasks: Iterable[Task],
        hear: Tell = tell_nobody,
    ) -> Generator[tuple[int, Result], None, None]:
        del hear
        context = self._context()
        group = f"convert-{secrets.token_hex(8)}"
        shipped = context.broadcast(cloudpickle.dumps(function))
        numbered = enumerate(tasks)
        outcomes: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        waiting: dict[int, InheritableThread] = {}
        try:
            while True:
                while len(waiting) < _AHEAD * context.defaultParallelism:
                    task = next(numbered, None)
                    if task is None:
                        break
                    run = partial(_run, context, group, partial(_do, group, shipped), *task)
                    thread = InheritableThread(target=run, args=(outcomes,), daemon=True)
                    waiting[task[0]] = thread
                    thread.start()
                if not waiting:
                    return
                index, outcome = outcomes.get()
                waiting.pop(index).join()
                if isinstance(outcome, ConversionError):
                    raise outcome
                yield index, outcome
        finally:
            while waiting:
                context.cancelJobGroup(group)  # again for those that had not begun their job yet
                with suppress(Empty):
                    index, _ = outcomes.get(timeout=0.5)
                    waiting.pop(index).join()
            shipped.destroy()

    def _context(self) -> SparkContext:
        session = self._session or SparkSession.getActiveSession()
        if session is None:
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
            session = self._session = SparkSession.builder.getOrCreate()
        context = session.sparkContext
        if str(context.master).startswith("local"):
            # As `python -m convert` finds the project here, executors of this machine do.
            path = context.environment.get("PYTHONPATH", "")
            if str(_ROOT) not in path.split(os.pathsep):
                context.environment["PYTHONPATH"] = os.pathsep.join(
                    filter(None, [str(_ROOT), path])
                )
        return context


def _run(
    context: SparkContext,
    group: str,
    do: Callable[[Any], Any],
    index: int,
    task: Any,
    outcomes: SimpleQueue[tuple[int, Any]],
) -> None:
    """Wait for one task, and put its result or its error in the queue."""
    try:
        context.setJobGroup(group, f"convert: task {index}", interruptOnCancel=True)
        [outcome] = context.parallelize([task], 1).map(do).collect()
        outcomes.put((index, outcome))
    except BaseException as error:
        outcomes.put((index, _failure(error)))


def _failure(error: BaseException) -> ConversionError:
    """What to say of a job that failed, as often as Spark is set to try it."""
    text = str(getattr(error, "java_exception", error))
    python = text.split("\n\tat ")[0].strip()  # of both tracebacks the one that says more
    last = python.splitlines()[-1] if python else type(error).__name__
    advice = (
        "Install the project where the executors run, or send it along with --py-files"
        if "ModuleNotFoundError" in last
        else "What is finished is kept: the same command goes on from there"
    )
    failure = ConversionError(f"a task failed on Spark: {last}. {advice}")
    failure.add_note(python)
    failure.__cause__ = error
    return failure


_unpacked: tuple[str, Any] = ("", None)
"""The function that this process was sent last, and what it is known by. It is kept, and what it
opened for one task is still open for the next."""


def _do(key: str, shipped: Broadcast[bytes], task: Any) -> Any:
    """Do a task, on an executor: its result, or a ConversionError that another try would repeat."""
    global _unpacked
    if _unpacked[0] != key:
        # Spark deletes these folders when the executor ends; nothing that Python could do then
        # would be done, for Spark ends its processes by the hard way.
        if folders := os.environ.get("SPARK_LOCAL_DIRS"):
            tempfile.tempdir = folders.split(",")[0]
        _unpacked = key, pickle.loads(shipped.value)
    try:
        result = _unpacked[1](task, tell_nobody)
        return result.get() if isinstance(result, Later) else result
    except ConversionError as error:
        return error
