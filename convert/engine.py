"""What runs the tasks of a conversion: processes of this machine, or something larger.

An engine decides where a task runs and nothing else, so that every engine writes the same data set.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from convert.errors import ConversionError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tell = Callable[[Any], None]
"""Takes a message about a task that is under way."""

_PRELOADED = ["convert.conversion", "streaming"]
"""Imported once, by the server that workers are forked from: streaming imports torch, which takes
seconds."""


def tell_nobody(message: Any) -> None:
    """A `Tell` that drops what it is told."""


class Engine(Protocol):
    """Runs a function on many tasks."""

    def map(
        self,
        function: Callable[[Task, Tell], Result],
        tasks: Iterable[Task],
        hear: Tell = tell_nobody,
    ) -> Generator[tuple[int, Result], None, None]:
        """Run `function` on every task.

        Args:
            function: Takes a task, and what it can tell of its progress. It is sent to other
                processes, like its tasks and results.
            tasks: Taken one by one, as there is somebody to do them.
            hear: Called here with what a function tells. An engine may leave it out.

        Returns:
            The place of each task and its result, in any order. Closing the iterator ends what is
            under way.

        Raises:
            ConversionError: If a worker ended before its task did.
            Exception: What `function` raises for a task.
        """


class LocalEngine:
    """Processes of this machine.

    They are forked from a server that has the imports, not from this process: a fork of a process
    with threads (those of an upload) can hang. So a script that asks for more than one worker needs
    `if __name__ == "__main__":`, as always with `multiprocessing`. A task that is alone, or one
    worker, runs in this process.

    Args:
        workers: How many, at least 1.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ConversionError(f"workers is {workers}: give a whole number of at least 1")
        self._workers = workers

    def map(
        self,
        function: Callable[[Task, Tell], Result],
        tasks: Iterable[Task],
        hear: Tell = tell_nobody,
    ) -> Generator[tuple[int, Result], None, None]:
        remaining = iter(tasks)
        first = list(islice(remaining, self._workers))
        numbered = enumerate(chain(first, remaining))
        if len(first) <= 1 or self._workers == 1:
            for index, task in numbered:
                yield index, function(task, hear)
            return
        crew = [_Worker(function) for _ in first]
        try:
            for worker in crew:
                worker.take(next(numbered, None))
            while busy := [worker for worker in crew if worker.task is not None]:
                ready = wait([worker.connection for worker in busy])
                for worker in busy:
                    if worker.connection not in ready:
                        continue
                    kind, value = worker.receive()
                    if kind == "told":
                        hear(value)
                    elif kind == "failed":
                        raise value
                    else:
                        assert worker.task is not None
                        index = worker.task
                        worker.take(next(numbered, None))  # first, so that nobody waits for us
                        yield index, value
        finally:
            for worker in crew:
                worker.end()


class _Worker:
    """A process and this end of its pipe.

    Args:
        function: What it does with its tasks. It keeps it, and what it opens for one task is still
            open for the next.
    """

    def __init__(self, function: Callable[[Any, Tell], Any]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.connection, theirs = context.Pipe()
        self.task: int | None = None
        """The place of the task that it does."""
        self._process = context.Process(
            target=_work, args=(theirs, function, dict(os.environ)), daemon=True
        )
        self._process.start()
        theirs.close()  # or its end would not be seen here

    def take(self, task: tuple[int, Any] | None) -> None:
        """Give it a task and its place, or nothing more to do."""
        self.task = None if task is None else task[0]
        if task is not None:
            try:
                self.connection.send(task)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise self._death() from error

    def receive(self) -> tuple[str, Any]:
        """What it says: ("told", a message), ("done", a result) or ("failed", an error)."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._death() from error

    def end(self) -> None:
        """End it at once. A task that it has not finished will be done again from its start."""
        self.connection.close()
        self._process.kill()
        self._process.join()

    def _death(self) -> ConversionError:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return ConversionError(
            f"a worker process died ({how}). The system kills processes that take too much "
            "memory: look at its log, and try fewer --workers. A conversion goes on where it was"
        )


def _end_with_parent() -> None:
    """End this process as soon as the one that it works for has ended, even amid a task.

    The kernel's signal for that (`leftovers.die_with_parent`) would come from the server, which
    itself lives as long as any worker does.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _work(
    connection: Connection, function: Callable[[Any, Tell], Any], environ: dict[str, str]
) -> None:
    """What a worker process does: one task after another, until nobody is there to send more."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, and one is to answer
    os.environ.update(environ)  # the server has that of the time when it started
    try:
        while True:
            index, task = connection.recv()
            del index
            try:
                result = function(task, lambda message: connection.send(("told", message)))
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))
                connection.send(("failed", error))
            else:
                connection.send(("done", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
