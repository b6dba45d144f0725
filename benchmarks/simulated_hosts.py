"""Several hosts on one machine: network namespaces that a bridge joins.

Each host has its own network, hostname, process ids and /dev/shm, and its own folder at a path that
is the same on all. Its cable can be pulled. Needs root and `ip` (iproute2).

Nothing has a name outside: namespaces live as long as their processes, and those end with the
thread that made them, however it ends. Runs beside each other do not meet, and a killed one leaves
nothing but its folder.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

BRIDGE_ADDRESS = "10.77.0.254"
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

TIED = ("setpriv", "--pdeathsig", "KILL")
"""Runs a command that the kernel kills when the thread that started it ends."""

_SET_UP = """
hostname "$1"
mount --bind "$2" "$3"
mount --bind "$4" /etc/hosts
mount -t tmpfs -o size=1g tmpfs /dev/shm
ip link set lo up
echo ready
# That it ignores SIGCHLD has the kernel bury the orphans that this first process inherits.
exec env --ignore-signal=CHLD sleep infinity
"""


def why_not() -> str | None:
    """Why hosts cannot be simulated here; None where they can. Found out by trying."""
    missing = [name for name in ("ip", "unshare", "nsenter", "setpriv") if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)} on this machine"
    attempt = subprocess.run(
        [
            *("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc"),
            *("sh", "-ec", "mount -t tmpfs tmpfs /dev/shm; ip link add bridge type bridge"),
        ],
        capture_output=True,
        text=True,
    )
    return attempt.stderr.strip() if attempt.returncode else None


class SimulatedHosts:
    """A context in which this thread, and what it starts, is on the bridge that joins the hosts.

    Args:
        count: How many hosts: `host0`, `host1`, …
        folder: An empty folder; all hosts see it.
        private: A folder in which each host sees files of its own.
    """

    def __init__(self, count: int, folder: Path, private: Path) -> None:
        self.hosts = [Host(index, folder, private) for index in range(count)]
        self._outside = -1

    def __enter__(self) -> list[Host]:
        self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _call("unshare", _CLONE_NEWNET)
            _ip("link set lo up")
            _ip("link add bridge type bridge")
            _ip(f"addr add {BRIDGE_ADDRESS}/24 dev bridge")
            _ip("link set bridge up")
            for host in self.hosts:
                host.start({host.name: host.address for host in self.hosts})
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self.hosts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for host in self.hosts:
            host.stop()
        _call("setns", self._outside, _CLONE_NEWNET)
        os.close(self._outside)


class Host:
    """One host of `SimulatedHosts`, which makes it."""

    def __init__(self, index: int, folder: Path, private: Path) -> None:
        self.name, self.address = f"host{index}", f"10.77.0.{index + 1}"
        self._cable = f"to-{self.name}"  # the bridge's end
        self._own, self._private = folder / self.name, private
        self._names = folder / f"{self.name}-names"
        self._holder: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The process whose namespaces are the host's."""
        assert self._holder is not None
        return self._holder.pid

    def start(self, addresses: dict[str, str]) -> None:
        """Make the host, and plug its cable in.

        Args:
            addresses: By name, for its /etc/hosts.
        """
        addresses = {"localhost": "127.0.0.1", **addresses}
        for path in (self._own / "tmp", self._private):
            path.mkdir(parents=True, exist_ok=True)
        self._names.write_text("".join(f"{a} {name}\n" for name, a in addresses.items()))
        self._holder = subprocess.Popen(
            [
                *(*TIED, "unshare", "--net", "--mount", "--pid", "--uts", "--ipc"),
                *("--fork", "--kill-child", "--mount-proc", "sh", "-ec", _SET_UP, "sh"),
                *(self.name, self._own, self._private, self._names),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"{self.name} could not be made")
        _ip(f"link add {self._cable} type veth peer name eth0 netns {self.pid}")
        _ip(f"link set {self._cable} master bridge up")
        for command in (f"addr add {self.address}/24 dev eth0", "link set eth0 up"):
            subprocess.run(self.command("ip", *command.split()), check=True)

    def stop(self) -> None:
        """End the host and all that runs on it."""
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()

    def command(self, *command: str | Path) -> list[str]:
        """What runs a command on the host when it is run here, in the host's own folder."""
        return [
            *("nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--ipc"),
            f"--pid=/proc/{self.pid}/ns/pid_for_children",
            *("sh", "-c", 'cd "$0" && TMPDIR="$0/tmp" exec "$@"', str(self._private)),
            *map(str, command),
        ]

    def pull_cable(self) -> None:
        """Cut the host off from the others and from the bridge."""
        _ip(f"link set {self._cable} down")

    def plug_cable(self) -> None:
        """Let the host reach the others again."""
        _ip(f"link set {self._cable} up")

    def rename_itself(self, address: str) -> None:
        """Change the address that the host, and no other, takes its own name for."""
        lines = self._names.read_text().splitlines()
        kept = [line for line in lines if not line.endswith(f" {self.name}")]
        self._names.write_text("\n".join([f"{address} {self.name}", *kept]) + "\n")

    def processes(self) -> dict[int, str]:
        """What runs on the host: command lines by process id, as seen from here."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid_for_children")
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns" / "pid") == space:
                    found[int(path.name)] = (
                        (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    )
            except OSError:  # it has ended meanwhile
                continue
        return {pid: line for pid, line in found.items() if line != "sleep infinity"}

    def await_idle(self, seconds: float) -> dict[int, str]:
        """Wait until nothing runs on the host.

        Returns:
            What still runs after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def kill_all(self) -> None:
        """SIGKILL whatever runs on the host."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _call(function: str, *arguments: int) -> None:
    if getattr(_libc, function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)
