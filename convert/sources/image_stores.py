"""Where the images are that JSON items name."""

from __future__ import annotations

import errno
import os
import platform
import stat
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from convert.errors import ConversionError, Reason, Rejected
from convert.sources.archive_index import composed, missing, one_of_several, spellings
from vlm_composer.read_ahead import map_ahead

T = TypeVar("T")

THREADS = 8
"""Requests of a bucket at a time, in each process: fewer than boto3 keeps connections."""


MAX_NAME = 4096
"""Characters of an image's name, by Linux's PATH_MAX."""
_FOLDERS = 1 << 14
_LISTED = 64


class ImageStore(ABC):
    """Images by their names. Like a source, it is sent to processes and opens its files there."""

    @abstractmethod
    def check(self) -> None:
        """Makes sure that it is there.

        Raises:
            ConversionError: If it is not.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change when it does."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """An image, byte for byte.

        Raises:
            Rejected: If the name leads nowhere or out of the store, or cannot be read.
        """

    def read_many(self, names: Iterable[str | Rejected]) -> Iterator[bytes | Rejected]:
        """Several images in order; where there is no name, what stands in its place."""
        for name in names:
            yield name if isinstance(name, Rejected) else or_reason(partial(self.read, name))

    def close(self) -> None:  # noqa: B027 (most hold nothing open)
        """Closes what this process has open."""


class ImageFolder(ImageStore):
    """A folder of image files.

    Args:
        root: What the items' `image` paths start from.
        max_image_bytes: Larger files are rejected without being read.
    """

    def __init__(self, root: str, max_image_bytes: int) -> None:
        self._given = root
        self._root = os.path.realpath(root)
        self._max_image_bytes = max_image_bytes
        self._folders: dict[str, str] = {}
        """Where the folders of names lead, of those last met."""
        self._listed: dict[str, dict[str, list[str]]] = {}
        """What folders hold in which a name was missing."""

    def check(self) -> None:
        if not os.path.isdir(self._root):
            raise ConversionError(
                f"{self._given}: no such folder, and no zip or tar; a folder of images holds "
                "00000/, 00001/, …"
            )

    def fingerprint(self) -> dict[str, Any]:
        return {"folder": self._root}

    def read(self, name: str) -> bytes:
        relative = self._relative(name)
        try:
            return self._read(relative)
        except (FileNotFoundError, NotADirectoryError) as error:
            if not os.path.isdir(self._root):
                raise ConversionError(
                    f"there is no folder {self._root} on {platform.node()}: every machine that "
                    "converts needs it at this path, all the time"
                ) from error
            return self._read_or_reject(name, self._look_up(name, relative))
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            raise _unreadable(error) from error

    def _read_or_reject(self, name: str, found: str) -> bytes:
        try:
            return self._read(found)
        except (FileNotFoundError, NotADirectoryError) as error:  # a link that leads nowhere
            raise missing(name, "images root", []) from error
        except (OSError, ValueError) as error:
            raise _unreadable(error) from error

    def _relative(self, name: str) -> str:
        """A name below the root; an absolute one may lie there."""
        if not os.path.isabs(name):
            return name
        plain = os.path.normpath(name)
        for root in (os.path.abspath(self._given), self._root):
            if plain.startswith(root.rstrip("/") + "/"):
                return os.path.relpath(plain, root)
        raise Rejected(
            Reason.OUTSIDE_IMAGES_ROOT, f"{name[:200]!r} is an absolute path, outside {self._root}"
        )

    def _look_up(self, name: str, relative: str) -> str:
        """The file that a name means under another spelling: with slashes, or as Unicode composes
        it otherwise.

        Raises:
            Rejected: There is none, or there are several.
        """
        for spelled in spellings(relative):
            found, parts = "", [part for part in spelled.split("/") if part not in ("", ".")]
            for part in parts:
                there = self._names(found)
                alike = there.get(part, []) or there.get(composed(part), [])
                alike = [part] if part in alike else alike
                if len(alike) > 1:
                    raise one_of_several(name, alike)
                if not alike:
                    break
                found = f"{found}/{alike[0]}".lstrip("/")
            else:
                return found
        names = sorted(self._names(found))
        near = bisect_left(names, part) if names else 0
        shown = (f"{found}/{other}".lstrip("/") for other in [*names[near:], *names[:near][::-1]])
        raise missing(name, "images root", shown)

    def _names(self, folder: str) -> dict[str, list[str]]:
        """Names in a folder, each for itself, and those that are composed otherwise."""
        if folder not in self._listed:
            if len(self._listed) == _LISTED:
                self._listed.clear()
            names: dict[str, list[str]] = {}
            with suppress(OSError):  # no folder, or none that may be listed
                for other in os.listdir(self._inside(folder, folder)):
                    names.setdefault(other, []).append(other)
                    if composed(other) != other:
                        names.setdefault(composed(other), []).append(other)
            self._listed[folder] = names
        return self._listed[folder]

    def _read(self, name: str) -> bytes:
        folder, _, base = name.rpartition("/")
        found = None if base in ("", ".", "..") else self._open_plain(folder, base)
        if found is None:  # a link, which may lead anywhere
            found = os.open(self._inside(name, name), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return self._read_open(found, name)
        finally:
            os.close(found)

    def _read_open(self, file: int, name: str) -> bytes:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe
            raise Rejected(Reason.UNREADABLE_IMAGE, f"{name!r} is not a file")
        if status.st_size > self._max_image_bytes:
            raise Rejected(
                Reason.TOO_LARGE,
                f"{status.st_size} bytes, more than a shard holds ({self._max_image_bytes})",
            )
        data = os.read(file, status.st_size)
        while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
            data += more
        return data

    def _open_plain(self, folder: str, base: str) -> int | None:
        """Open a file of a folder, whose way is looked up only once; None if it is a link."""
        if folder not in self._folders:
            if len(self._folders) == _FOLDERS:
                self._folders.clear()
            self._folders[folder] = self._inside(folder, f"{folder}/{base}")
        try:
            path = f"{self._folders[folder]}/{base}"
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise

    def _inside(self, path: str, name: str) -> str:
        """Where a path below the root leads, through all links; `name` is for the message."""
        real = os.path.realpath(os.path.join(self._root, path))
        if os.path.commonpath([self._root, real]) != self._root:
            raise Rejected(Reason.OUTSIDE_IMAGES_ROOT, f"{name!r} leads to {real!r}")
        return real


def _unreadable(error: Exception) -> Rejected:
    return Rejected(Reason.UNREADABLE_IMAGE, f"{type(error).__name__}: {error}")


def image_name(fields: object) -> str | Rejected:
    """The image that an item names, or why it names none."""
    name = fields.get("image") if isinstance(fields, dict) else None
    if isinstance(name, str) and name:
        return name if len(name) <= MAX_NAME else too_long(name)
    return Rejected(Reason.BAD_IMAGE_FIELD, "the item names no image")


def too_long(name: str) -> Rejected:
    """Return why a name of more than `MAX_NAME` characters is not looked up: each of its folders
    would be, for seconds."""
    return Rejected(
        Reason.UNREADABLE_IMAGE,
        f"{name[:60]!r}… has {len(name):,} characters, and a path at most {MAX_NAME:,}: give the "
        "image's path, not the image itself",
    )


def or_reason(read: Callable[[], bytes]) -> bytes | Rejected:
    """What `read` returns, or the reason why not."""
    try:
        return read()
    except Rejected as rejected:
        return rejected.with_traceback(None)


def in_window(
    threads: ThreadPoolExecutor, read: Callable[[T], bytes], names: Iterable[T | Rejected]
) -> Iterator[bytes | Rejected]:
    """Reads several images at a time, and gives them in order.

    Args:
        threads: Who reads.
        read: Reads one; a `Rejected` that it raises stands in its place.
        names: What `read` is given; a `Rejected` among them is passed on.
    """

    def outcome(name: T | Rejected) -> bytes | Rejected:
        return name if isinstance(name, Rejected) else or_reason(partial(read, name))

    return map_ahead(threads, outcome, names, 2 * THREADS - 1)
