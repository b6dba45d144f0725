"""WebDataset tars: samples are the members that share a key."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from convert.errors import ConversionError, Reason, Rejected
from convert.sources.captions import captioned, decode_text
from convert.sources.json_lines import decode_line
from convert.sources.patterns import list_files, stamp_files
from convert.sources.source import PIECE_ITEMS, Item, Piece
from convert.sources.tar_samples import TarSample, TarSamples

_ADJACENT = "; the members of a key must stand one behind the other, as `tar --sort=name` puts them"
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class WebDataset:
    """Tars whose samples are consecutive members with the same name up to the first dot.

    A sample has one image, and `.txt` or `.caption` with its caption, or `.json` with LLaVA's
    `conversations` or a `caption`. A caption has no prompt: the prompt is then `<image>` alone. The
    key is the id, where LLaVA's JSON gives none.

    An uncompressed tar is read from where a piece starts, a compressed one from its start: make it
    of a size that this is no matter for, as WebDatasets are.

    Args:
        pattern: A file, a folder, a pattern, or the URL of such: see `list_files`.
        max_image_bytes: Larger images are rejected without being read.
        name: What it is called among several sources.
    """

    def __init__(self, pattern: str, max_image_bytes: int, name: str = "") -> None:
        self.name = name
        self._pattern = os.fspath(pattern)
        self._max_image_bytes = max_image_bytes
        self._open: TarSamples | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def fingerprint(self) -> dict[str, Any]:
        return {"webdataset": self._pattern, **stamp_files(self.files())}

    def files(self) -> list[str]:
        return list_files(self._pattern, SUFFIXES)

    def pieces(self, file: str) -> Iterator[Piece]:
        where: dict[str, Any] = {}
        count, number, key = 0, 0, ""
        samples = TarSamples(file, self._max_image_bytes)
        try:
            while (sample := samples.take(read=False)) is not None:
                if count == PIECE_ITEMS:
                    yield Piece(count, where)
                    number, count = number + count, 0
                if count == 0:
                    where = {"file": file, "offset": sample.offset, "number": number}
                    where["shares_key"] = sample.key == key
                key = sample.key
                count += 1
        finally:
            samples.close()
        if count:
            yield Piece(count, where)

    def read(self, piece: Piece, wanted: Sequence[bool]) -> Iterator[Item]:
        file, number = piece.where["file"], piece.where["number"]
        if self._open is None or self._open.file != file:
            self.close()
            self._open = TarSamples(file, self._max_image_bytes)
        samples = self._open
        near = (number, piece.where["offset"], piece.where["shares_key"])
        for index, want in enumerate(wanted):
            if want:
                samples.go_to(number + index, near=near)
                sample = samples.take(read=True)
                if sample is None:
                    raise ConversionError(
                        f"{file} is not what it was when this conversion began (it ends before "
                        f"sample {number + index}): leave it alone, and start again"
                    )
                problem = _ambiguity(sample)
                yield Item(index, problem or _fields(sample), problem or _image(sample))

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _ambiguity(sample: TarSample) -> Rejected | None:
    """Why it is not known what belongs together, if it is not."""
    name, key = sample.image_name or sample.names[0], sample.key[:200]
    if sample.shares_key:
        dotted = "." in os.path.splitext(name)[0].removeprefix(sample.key)
        advice = "rename the files without dots" if dotted else "give each sample a key of its own"
        return Rejected(
            Reason.AMBIGUOUS_KEY,
            f"{name[-200:]!r}: several images have the key {key!r}, for a key ends at the first "
            f"dot of a file's name, as WebDataset has it; {advice}",
        )
    if sample.repeated is not None:
        return Rejected(
            Reason.AMBIGUOUS_KEY,
            f"the key {key!r} has two members {sample.repeated[-200:]!r}; give each sample a key "
            "of its own",
        )
    return None


def _image(sample: TarSample) -> bytes | Rejected:
    if sample.image is None:
        return Rejected(
            Reason.MISSING_IMAGE, f"no image in {sample.key[:200]!r}: {sample.held()}{_ADJACENT}"
        )
    return sample.image


def _fields(sample: TarSample) -> object | Rejected:
    image = sample.image_name or sample.key
    value = decode_line(sample.json) if isinstance(sample.json, bytes) else sample.json
    if isinstance(value, dict) and "conversations" in value:
        turns = value["conversations"]
        return {"id": value.get("id", sample.key), "image": image, "conversations": turns}
    if isinstance(sample.text, bytes):
        try:
            caption: object = decode_text(sample.text).strip()  # a file's last line ends, too
        except (UnicodeDecodeError, Rejected) as error:
            detail = error.detail if isinstance(error, Rejected) else error
            return Rejected(Reason.NOT_UNICODE, f"the caption of {sample.key!r}: {detail}")
        return captioned(sample.key, image, caption)
    if isinstance(sample.text, Rejected):
        return sample.text
    if isinstance(value, dict):
        caption = value.get("caption", value.get("text"))
        if caption is not None:
            return captioned(sample.key, image, caption)
    elif value is not None:
        no_object = Rejected(Reason.NOT_AN_OBJECT, f"a {type(value).__name__}, not an object")
        return value if isinstance(value, Rejected) else no_object
    return Rejected(
        Reason.NO_CONVERSATION,
        f"no .txt, no .caption, and no caption or conversations in a .json of "
        f"{sample.key[:200]!r}, which ends at the first dot: {sample.held()}{_ADJACENT}",
    )
