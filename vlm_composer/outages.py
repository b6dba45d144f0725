"""Failures that a run survives: stores that are away, and what only describes the run.

The SDKs' own retries are off (see `storage`): `ride_out` waits for as long as its caller states.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 (before _register_atexit)
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_LOCAL_FAULTS = _DISK_FULL | {
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    errno.EEXIST,
}
_MALFORMED = "ParamValidationError"
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")

# Before Python ends a process it waits for its threads, in which boto3 can start none any more.
# This is set before that, as the last to register is called first.
_ending = threading.Event()
threading._register_atexit(_ending.set)  # type: ignore[attr-defined]


class StoreError(OSError):
    """A store cannot be used; the message says why and what to do."""


class RefusedError(StoreError):
    """The store answers, and does not do what was asked of it."""


class MissingFileError(RefusedError):
    """The store answers, and has no such file."""


class TooLargeError(StoreError):
    """A file of the store has more bytes than it should."""


@contextmanager
def best_effort(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Turn any failure into one warning: for what only describes a run and must not end it.

    Nothing that all ranks must do together belongs inside: one of them would leave it early.

    Args:
        what: What is tried, for the warning, for example "write runs/demo/run.json".
        quiet: Do not warn, for it failed the last time too.
    """
    try:
        yield
    except Exception as error:
        if not quiet:
            log.warning("Could not %s (%s); the run continues without it.", what, _brief(error))


def ride_out(action: Callable[[], T], what: str, seconds: float) -> T:
    """Run `action` until it succeeds, waiting for a store that is away.

    Args:
        action: What to do; it may be run several times.
        what: Its name for messages, for example "download s3://…/shard.00000.00000.mds".
        seconds: How long it may keep failing; 0 raises the first failure.

    Returns:
        What `action` returns.

    Raises:
        RefusedError: The store answered, in a way that time does not mend (no such bucket or
            object, no permission).
        StoreError: It failed in another such way (disk full), or for longer than `seconds`; or the
            process is ending and waits for this thread.
    """
    pause, deadline = 0.25, None
    while True:
        try:
            return action()
        except StoreError:
            raise  # it says what to do
        except Exception as error:  # each SDK raises classes of its own
            if is_permanent(error):
                kind = StoreError if _http_status(error) is None else RefusedError
                raise kind(f"could not {what}: {advice(error)}") from error
            if seconds <= 0:
                raise StoreError(f"could not {what}: {advice(error)}") from error
            if _ending.is_set():
                raise StoreError(f"could not {what}: the process is ending") from error
            now = time.monotonic()
            if deadline is None:
                deadline = now + seconds
                log.warning(
                    "Could not %s (%s); trying again for %.0f s", what, _brief(error), seconds
                )
            if now >= deadline:
                raise StoreError(
                    f"could not {what}: the store was away for {seconds:.0f} s "
                    f"({_brief(error)}); start the run again once it is back"
                ) from error
            _ending.wait(min(pause, deadline - now))
            pause = min(2 * pause, 5.0)


def is_permanent(error: BaseException) -> bool:
    """Whether waiting cannot mend `error`, raised by a store's SDK or the local disk."""
    if isinstance(error, StoreError) or type(error).__name__ in (*_NO_CREDENTIALS, _MALFORMED):
        return True
    status = _http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, OSError) and error.errno in _LOCAL_FAULTS


def _http_status(error: BaseException) -> int | None:
    """The status of the HTTP answer behind an error of boto3, google-cloud-storage or azure."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        if response.get("Error", {}).get("Code") == "RequestTimeout":
            return 408  # S3 answers 400
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for attribute in ("code", "status_code"):  # google.api_core, azure.core
        value = getattr(error, attribute, None)
        if isinstance(value, int):
            return int(value)
    return None


def _brief(error: BaseException) -> str:
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message or 'no message'}"


def advice(error: BaseException) -> str:
    """What a user can do about an error, with the error."""
    status = _http_status(error)
    if type(error).__name__ in _NO_CREDENTIALS:
        todo = "no credentials were found; set them in the environment"
    elif status == 404:
        todo = "there is no such bucket or object; check the name"
    elif status in (400, 401, 403):
        todo = "it was refused; check the credentials and their permissions"
    elif isinstance(error, OSError) and error.errno in _DISK_FULL:
        todo = "the local disk is full; free some space"
    elif isinstance(error, OSError) and error.errno in _LOCAL_FAULTS:
        todo = "check the path and its permissions"
    else:
        todo = "check the bucket's name, the endpoint, the credentials and the network"
    return f"{todo} ({_brief(error)})"
