"""One JSON list, of which only a window is ever in memory."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO

from convert.errors import ConversionError

_CHUNK_BYTES = 1 << 20
_SLACK = 16
"""Characters before the window's end where a value may look wrong for being cut (`-Infinit`)."""

_decoder = json.JSONDecoder()
_space = re.compile(r"[ \t\n\r]*")
_between = re.compile(r"[ \t\n\r]*,?[ \t\n\r]*")
_UTF8 = ("utf-8", "surrogatepass")  # as json.loads reads bytes; the record refuses half a pair


class _Window:
    """The part of a file that is being looked at.

    `text[at]` is the next character, and `offset` its place in the file in bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(_UTF8[0])(_UTF8[1])
        self._bytes_read = 0
        self._ended = False
        self.text, self.at, self.offset = "", 0, 0
        self._read_on()
        if self.text.startswith("\ufeff"):
            self.pass_to(1)

    def pass_to(self, at: int) -> None:
        """Leaves everything before `at` behind."""
        self.offset += self._num_bytes(at)
        self.at = at

    def next_character(self) -> str:
        """Passes white space; returns the character after it, or "" at the end of the file."""
        while True:
            match = _space.match(self.text, self.at)
            assert match
            self.pass_to(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if self._ended:
                return ""
            self._read_on()

    def value_end(self) -> int:
        """Where the value that starts here ends, in `text`.

        What is read on is as much as there was, so that a value of any size is parsed a few times.
        """
        while True:
            try:
                _, end = _decoder.raw_decode(self.text, self.at)
                if self._ended or len(self.text) - end > _SLACK:  # else a number may go on
                    return end
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or len(self.text) - error.pos <= _SLACK
                if self._ended or not cut:
                    raise
            self._read_on()

    def place_of(self, error: Exception) -> str:
        """What is wrong, and at which byte of the file."""
        if isinstance(error, UnicodeDecodeError):
            return f"{error.reason} at byte {self._bytes_read + error.start}"
        if isinstance(error, json.JSONDecodeError):
            place = self.offset + self._num_bytes(error.pos)
            return f"{error.msg.removesuffix(' at')} at byte {place}"
        return f"{error} after byte {self.offset}"

    def _num_bytes(self, at: int) -> int:
        passed = self.text[self.at : at]
        return len(passed) if passed.isascii() else len(passed.encode(*_UTF8))

    def _read_on(self) -> None:
        self.text, self.at = self.text[self.at :], 0
        data = self._file.read(max(_CHUNK_BYTES, len(self.text)))
        self._ended = not data
        begun = len(self._decoder.getstate()[0])  # bytes of a character that was cut
        self._bytes_read -= begun
        self.text += self._decoder.decode(data, self._ended)
        self._bytes_read += begun + len(data)


def item_spans(file: BinaryIO, path: str) -> Iterator[tuple[int, int]]:
    """Finds the items of a JSON list.

    Args:
        file: The file, at its start.
        path: Its name for messages.

    Yields:
        Where an item starts and ends, in bytes.

    Raises:
        ConversionError: If the file is not one JSON list with at least one item.
    """
    window = None
    try:
        window = _Window(file)
        if window.next_character() != "[":
            raise ConversionError(f"{path} holds a {_kind(window)}, not a list of items")
        window.pass_to(window.at + 1)
        empty = window.next_character() == "]"
        following = "]" if empty else ","
        while following == ",":
            start = window.offset
            window.pass_to(window.value_end())
            yield start, window.offset
            following = window.next_character()
            if following == ",":
                window.pass_to(window.at + 1)
                window.next_character()
        if following != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", window.text, window.at)
        window.pass_to(window.at + 1)
        if window.next_character():
            raise json.JSONDecodeError("Extra data", window.text, window.at)
        if empty:
            raise ConversionError(f"{path} holds an empty list: there is nothing to convert")
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError) and window is None:
            place = f"{error.reason} at byte {error.start}"
        else:
            assert window is not None
            place = window.place_of(error)
        raise ConversionError(
            f"{path} is not valid JSON ({place}): it should be one list of items, such as "
            "blip_laion_cc_sbu_558k.json, or be named .jsonl and hold one item a line"
        ) from error


def _kind(window: _Window) -> str:
    """The type of a value that is not a list. A large one is not read to its end for that."""
    text = window.text[window.at :]
    if len(text) >= _CHUNK_BYTES // 4 and text.startswith("{"):
        return "dict"
    try:
        return type(json.loads(text)).__name__
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(error.msg, window.text, window.at + error.pos) from None


def decode_items(data: bytes) -> Iterator[object]:
    """Decodes items of a list, with whatever stands between them.

    Args:
        data: The file from where one of `item_spans` starts to where one ends.

    Raises:
        ValueError: If that is not what it is.
    """
    text, at = data.decode(*_UTF8), 0
    while at < len(text):
        # The stack may be taller here than it was in `item_spans`, which has let the item pass.
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(2 * limit)
        try:
            value, at = _decoder.raw_decode(text, at)
        finally:
            sys.setrecursionlimit(limit)
        yield value
        match = _between.match(text, at)
        assert match
        at = match.end()
