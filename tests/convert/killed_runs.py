"""Runs a conversion in a process of its own, and kills it (SIGKILL) at a place in the code.

`python killed_runs.py` is that process. At the place it says so through a FIFO and waits; nothing
sleeps. Its worker processes import this file too, and so wait at the same place.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_TREE = Path(__file__).parents[2]


def wait_for_fifo(fifo: int, process: subprocess.Popen[Any]) -> bytes:
    """What is written into a FIFO; an error if the process ends before anything is."""
    end = os.pidfd_open(process.pid)
    try:
        assert fifo in wait([fifo, end]), "it ended before it got there"
        return os.read(fifo, 100)
    finally:
        os.close(end)


def kill_at(place: str, call: int, folder: Path, *arguments: Any, **settings: Any) -> None:
    """Convert, and kill the conversion when it enters a function.

    Args:
        place: "module:function" or "module:Class.method".
        call: Which call of it in one process, from 1.
        folder: For the FIFO.
        arguments: Of `convert_llava`.
        settings: Of `convert_llava`.
    """
    path = folder / "fifo"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    called = json.dumps([[os.fspath(argument) for argument in arguments], settings])
    run = subprocess.Popen(
        [sys.executable, __file__, called],
        env={**os.environ, "KILLED_RUN": f"{place} {call} {path}", "PYTHONPATH": str(_TREE)},
        cwd=_TREE,
    )
    try:
        wait_for_fifo(fifo, run)
    finally:
        run.kill()
        assert run.wait() == -signal.SIGKILL
        os.close(fifo)


def _stop_at(place: str, call: str, path: str) -> None:
    module, _, name = place.partition(":")
    holder, (*holders, name) = importlib.import_module(module), name.split(".")
    for part in holders:
        holder = getattr(holder, part)
    real, calls = getattr(holder, name), iter(range(1, 1 << 30))

    def stop_or_run(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == int(call):
            Path(path).write_text("here")
            signal.pause()
        return real(*arguments, **settings)

    setattr(holder, name, stop_or_run)


if "KILLED_RUN" in os.environ:
    _stop_at(*os.environ["KILLED_RUN"].split(" ", 2))

if __name__ == "__main__":
    from convert import convert_llava

    arguments, settings = json.loads(sys.argv[1])
    convert_llava(*arguments, **settings, show_progress=False)
