"""Ranks that cannot reach each other: what the user is told, in one line that says what to do.

torch ends such a run with a trace of its internals, and waits for a missing rank without a word.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
from composer.utils import dist, get_device

from vlm_composer.config import TrainConfig

log = logging.getLogger(__name__)

SILENT_SECONDS = 15.0
"""How long a rank looks for rank 0 before it says so: nodes never start at the same moment."""


class ContactError(ConnectionError):
    """A rank cannot reach another one; the message says what it waited for and what to do."""


def join_ranks(device: str, timeout: float) -> None:
    """Set up the process group: wait for all ranks to come.

    Args:
        device: "cpu" or "gpu".
        timeout: Seconds to wait, for this and for every later collective operation.

    Raises:
        ContactError: Not all came, or they cannot connect to each other.
    """
    world_size, rank = dist.get_world_size(), dist.get_global_rank()
    if world_size == 1 or torch.distributed.is_initialized():
        dist.initialize_dist(get_device(device), timeout=timeout)
        return
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    meeting_point = f"{host}:{port}"
    if rank == 0 and world_size > dist.get_local_world_size():
        log.info("Waiting up to %.0f s for %d ranks at %s.", timeout, world_size, meeting_point)
    if rank != 0 and port.isdecimal():
        _await_rank_zero(host, int(port), timeout)
    try:
        dist.initialize_dist(get_device(device), timeout=timeout)
    except RuntimeError as error:  # torch's DistError, gloo's own
        if came := re.search(r"([0-9]+)/[0-9]+ clients joined", str(error)):
            raise ContactError(
                f"waited {timeout:.0f} s (dist_timeout) at {meeting_point}, and only {came[1]} of "
                f"{world_size} ranks came, this one among them; start the same command on every "
                "node, with the same --world_size, --master_addr and --master_port and its own "
                "--node_rank and --base_rank, and see that the others can reach "
                f"{meeting_point}"
            ) from error
        raise ContactError(
            f"could not join the {world_size} ranks that meet at {meeting_point} "
            f"({_brief(error)}); see that each of them runs, that the port is free on the first "
            "node, and that the nodes can connect to each other on any port; where a node has "
            "several networks, or takes its own name for 127.0.1.1, GLOO_SOCKET_IFNAME (on GPUs "
            "NCCL_SOCKET_IFNAME) names the interface to use"
        ) from error


@contextmanager
def explain_lost_contact(config: TrainConfig) -> Iterator[None]:
    """Turn what a collective operation raises when a peer is gone into a ContactError."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_contact(error):
            raise
        raise ContactError(
            f"lost contact with the other ranks: {_what_happened(error, config.dist_timeout)} "
            f"({_brief(error)}); {_how_to_go_on(config)}"
        ) from error


def _await_rank_zero(host: str, port: int, timeout: float) -> None:
    """Return when rank 0 listens. torch's client would print a trace for every attempt."""
    started, told = time.monotonic(), False
    while True:
        left = started + timeout - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(left, 0.1)).close()
        except OSError as error:
            waited = time.monotonic() - started
            if waited >= timeout:
                raise ContactError(
                    f"could not reach rank 0 at {host}:{port} for {timeout:.0f} s (dist_timeout; "
                    f"{error}); see that --master_addr and --master_port name the node with "
                    "--node_rank 0 and are the same on every node, that the command was started "
                    "there, and that no firewall is between"
                ) from error
            if waited > SILENT_SECONDS and not told:
                told = True
                log.warning("Still looking for rank 0 at %s:%d (%s).", host, port, error)
            time.sleep(0.2)
        else:
            return


def _is_lost_contact(error: RuntimeError) -> bool:
    network = (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    # NCCL's own words were not met in a run: nothing here was run on a GPU.
    words = ("gloo/transport", "ncclRemoteError", "collective operation timeout")
    return isinstance(error, network) or any(word in str(error) for word in words)


def _what_happened(error: RuntimeError, timeout: float) -> str:
    if "timed out" in str(error).lower() or "timeout" in str(error).lower():
        return (
            f"one of them did not answer for {timeout:.0f} s (dist_timeout), as when its node or "
            "the network is down"
        )
    return "a connection was closed, as when another rank has ended: its log says why"


def _how_to_go_on(config: TrainConfig) -> str:
    if config.save_folder is None:
        return "nothing was saved: there is no save_folder"
    again = "to go on from the newest checkpoint start the same command on every node"
    return again if config.autoresume else f"{again} with autoresume: true"


def _brief(error: RuntimeError) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"\[[^\]\s]*\.(cc|cpp|h):[0-9]+\] ", "", lines[0])[:200]
