"""What the tests' store servers have in common: a process on a free port of 127.0.0.1."""

import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path

_STARTUP_SECONDS = 30


class StoreServer(ABC):
    """One server with its own buckets. What it holds outlives `kill` and `start`.

    Args:
        folder: An empty folder for its data.
    """

    env: dict[str, str]
    """What its clients need in their environment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        # A start amid a kill would take the dying process for a running one.
        self._lock = threading.RLock()
        self.url = f"http://127.0.0.1:{self._port}"

    @abstractmethod
    def _command(self) -> list[str | Path]:
        """The program and its arguments."""

    def _process_env(self) -> dict[str, str] | None:
        """Its environment; None for this process's."""
        return None

    @abstractmethod
    def make_bucket(self, name: str) -> str:
        """Makes a bucket and returns its URL."""

    def start(self) -> None:
        """Starts the server, if it is not running, and returns when it answers."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        log_path = self._folder / "server.log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), env=self._process_env(), stdout=log, stderr=log
            )
        deadline = time.monotonic() + _STARTUP_SECONDS
        while not _answers(self._port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(log_path.read_text(errors="replace"))
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends the server at once (SIGKILL), as an outage does."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait(timeout=30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
