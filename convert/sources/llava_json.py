"""Where items and images come from."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from convert.errors import ConversionError, Reason, Rejected


class Source(Protocol):
    """A sequence of LLaVA items and the images that they name."""

    def __len__(self) -> int:
        """How many items there are."""

    def items(self) -> Iterator[object]:
        """Every item in order, as JSON gives it: nothing is known of its type yet."""

    def image_bytes(self, name: str) -> bytes:
        """The image that an item names, byte for byte.

        Raises:
            Rejected: If the name leads nowhere or out of the images root, or cannot be read.
        """


class LlavaJson:
    """One JSON list, and a folder of images: the form LLaVA-Pretrain is published in.

    Args:
        json_path: A JSON file, a list of `{"id", "image", "conversations"}`. It is held in memory.
        images_root: The folder that the items' `image` paths start from.
        max_image_bytes: Larger files are rejected without being read.

    Raises:
        ConversionError: If the file is not a JSON list with at least one item, or the folder does
            not exist.
        OSError: If the file cannot be read.
    """

    def __init__(
        self, json_path: str | Path, images_root: str | Path, max_image_bytes: int
    ) -> None:
        if not os.path.isdir(images_root):
            raise ConversionError(
                f"{images_root}: no such folder; the images root holds 00000/, 00001/, …"
            )
        self._root = os.path.realpath(images_root)
        self._max_image_bytes = max_image_bytes
        self._items = _read_json_list(Path(json_path))

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> Iterator[object]:
        return iter(self._items)

    def image_bytes(self, name: str) -> bytes:
        try:
            if os.path.isabs(name):
                raise Rejected(Reason.OUTSIDE_IMAGES_ROOT, f"{name!r} is an absolute path")
            path = os.path.realpath(os.path.join(self._root, name))
            if os.path.commonpath([self._root, path]) != self._root:
                raise Rejected(Reason.OUTSIDE_IMAGES_ROOT, f"{name!r} leads to {path!r}")
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe that would block for ever
                raise Rejected(Reason.UNREADABLE_IMAGE, f"{name!r} is not a file")
            if status.st_size > self._max_image_bytes:
                raise Rejected(
                    Reason.TOO_LARGE,
                    f"{status.st_size} bytes, more than a shard holds ({self._max_image_bytes})",
                )
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Rejected(Reason.MISSING_IMAGE, f"no file {name!r} in the images root") from error
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            raise Rejected(Reason.UNREADABLE_IMAGE, f"{type(error).__name__}: {error}") from error


def _read_json_list(path: Path) -> list[object]:
    try:
        items = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path} is not valid JSON ({error}): it should be one list of items, such as "
            "blip_laion_cc_sbu_558k.json"
        ) from error
    if not isinstance(items, list):
        raise ConversionError(f"{path} holds a {type(items).__name__}, not a list of items")
    if not items:
        raise ConversionError(f"{path} holds an empty list: there is nothing to convert")
    return items
