"""What runs the tasks of a conversion: processes of this machine, or something larger.

An engine decides where a task runs and nothing else, so that every engine writes the same data set.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, TypeVar

from convert.errors import ConversionError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tell = Callable[[Any], None]
"""Takes a message about a task that is under way."""

_PRELOADED = ["convert.conversion"]
"""Imported once, by the server that workers are forked from."""
_SLOW = ("torch", "streaming", "transformers")
"""What a script that has imported it would have every worker import again, in seconds each."""


@dataclass(frozen=True)
class Later(Generic[Result]):
    """A result that counts once something else is done that goes on by itself, such as an upload.

    An engine gives it to nobody before that, and may have the next task begun meanwhile.
    """

    result: Result
    underway: Sequence[Future[Any]]

    def is_settled(self) -> bool:
        """Whether all is done."""
        return all(future.done() for future in self.underway)

    def get(self) -> Result:
        """The result, once all is done.

        Raises:
            Exception: What went wrong meanwhile.
        """
        for future in self.underway:
            future.result()
        return self.result


def tell_nobody(message: Any) -> None:
    """A `Tell` that drops what it is told."""


class Engine(Protocol):
    """Runs a function on many tasks."""

    def map(
        self,
        function: Callable[[Task, Tell], Result | Later[Result]],
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
        slow = [name for name in _SLOW if name in sys.modules]
        self._preload = [*_PRELOADED, *slow]

    def map(
        self,
        function: Callable[[Task, Tell], Result | Later[Result]],
        tasks: Iterable[Task],
        hear: Tell = tell_nobody,
    ) -> Generator[tuple[int, Result], None, None]:
        remaining = iter(tasks)
        first = list(islice(remaining, self._workers))
        numbered = enumerate(chain(first, remaining))
        if len(first) <= 1 or self._workers == 1:
            yield from _map_here(function, numbered, hear)
            return
        crew = [_Worker(function, self._preload) for _ in first]
        try:
            for worker in crew:
                worker.take(next(numbered, None))
            while busy := [worker for worker in crew if worker.num_tasks]:
                ready = wait([worker.connection for worker in busy])
                for worker in busy:
                    if worker.connection not in ready:
                        continue
                    kind, value = worker.receive()
                    if kind == "told":
                        hear(value)
                    elif kind == "failed":
                        raise value
                    elif kind == "free":
                        worker.take(next(numbered, None))
                    else:
                        if kind == "done":
                            worker.take(next(numbered, None))  # first, so that it need not wait
                        worker.num_tasks -= 1
                        yield value
        finally:
            for worker in crew:
                worker.end()


def _map_here(
    function: Callable[[Task, Tell], Result | Later[Result]],
    tasks: Iterable[tuple[int, Task]],
    hear: Tell,
) -> Generator[tuple[int, Result], None, None]:
    """`LocalEngine.map` in this process."""
    later: list[tuple[int, Later[Result]]] = []
    try:
        for index, task in tasks:
            result = function(task, hear)
            while later:
                before, waiting = later.pop()
                yield before, waiting.get()
            if isinstance(result, Later):
                later.append((index, result))
            else:
                yield index, result
    except Exception:
        for before, waiting in later:  # what is done need not be done again
            yield before, waiting.get()
        raise
    for before, waiting in later:
        yield before, waiting.get()


class _Worker:
    """A process and this end of its pipe.

    Args:
        function: What it does with its tasks. It keeps it, and what it opens for one task is still
            open for the next.
        preload: What the server imports, if this starts it.
    """

    def __init__(self, function: Callable[[Any, Tell], Any], preload: list[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(preload)
        self.connection, theirs = context.Pipe()
        self.num_tasks = 0
        """Of which it has not sent the result."""
        self._process = context.Process(
            target=_work, args=(theirs, function, dict(os.environ)), daemon=True
        )
        try:
            self._process.start()
        except OSError as error:
            if "AF_UNIX path too long" not in str(error):
                raise
            raise ConversionError(
                f"the folder for temporary files, {tempfile.gettempdir()}, has too long a path for "
                "the socket that workers are started through: set TMPDIR to a shorter one, or give "
                "--workers 1"
            ) from error
        theirs.close()  # or its end would not be seen here

    def take(self, task: tuple[int, Any] | None) -> None:
        """Give it a task and its place, or nothing more to do. It takes them when it is free."""
        self.num_tasks += task is not None
        try:
            self.connection.send(task)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._death() from error

    def receive(self) -> tuple[str, Any]:
        """What it says.

        Returns:
            ("told", a message), ("failed", an error); ("done", place and result), where it is free
            for the next task; or ("free", None), and at some time ("settled", place and result).
        """
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
    later: list[tuple[int, Later[Any]]] = []

    def settle() -> None:
        while later:
            index, result = later.pop()
            connection.send(("settled", (index, result.get())))

    def tell(message: Any) -> None:
        connection.send(("told", message))
        if later and later[0][1].is_settled():
            settle()

    try:
        while True:
            task = connection.recv()
            try:
                try:
                    result = None if task is None else function(task[1], tell)
                finally:
                    settle()  # what is done need not be done again
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))
                connection.send(("failed", error))
                continue
            if isinstance(result, Later):
                later.append((task[0], result))
                connection.send(("free", None))
            elif task is not None:
                connection.send(("done", (task[0], result)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
