"""What the tests' store servers have in common: a process on a free port of an address."""

import errno
import http.client
import random
import signal
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path

import pytest

SERVERS = {"s3": "s3_server", "gs": "gcs_server", "azure": "azure_server"}
"""The fixture with the server of each kind of URL."""
BUCKETS = [pytest.param(kind, marks=pytest.mark.s3) for kind in SERVERS]
_PATIENCE = 120


class StoreServer(ABC):
    """One server with its own buckets. What it holds outlives `kill` and `start`.

    Args:
        folder: An empty folder for its data.
        host: The address of this machine that it listens on.
    """

    env: dict[str, str]
    """What its clients need in their environment."""
    killed_by = signal.SIGKILL

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self._folder = folder
        self._host, self._port = host, free_port(host)
        self._process: subprocess.Popen[bytes] | None = None
        # One thread starts what another kills.
        self._lock = threading.RLock()
        self.url = f"http://{host}:{self._port}"

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
        """Starts the server, if it does not run and answer, and returns when it does."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        running = self._process is not None and self._process.poll() is None
        if running and _answers(self._host, self._port):
            return
        self.kill()  # one that a signal ends looks alive for a moment, and answers nobody
        log_path = self._folder / "server.log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), env=self._process_env(), stdout=log, stderr=log
            )
        deadline = time.monotonic() + _PATIENCE
        while not _answers(self._host, self._port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(log_path.read_text(errors="replace"))
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends the server at once, as an outage does."""
        with self._lock:
            if self._process is not None:
                self._process.send_signal(self.killed_by)
                self._process.wait(timeout=_PATIENCE)


def free_port(host: str) -> int:
    """A port that no client's connection is given while the server is down."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # clients have those from 32,768
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


def _answers(host: str, port: int) -> bool:
    """Whether it serves requests: MinIO refuses them for a moment once it listens."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status != http.client.SERVICE_UNAVAILABLE
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
