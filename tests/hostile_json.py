"""JSON that nobody should follow, each made of a real file by one change: indexes above all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streaming.base.format.mds.encodings import get_mds_encodings

VALUES = (-1, -(10**13), 10**13, 10**400, 1.5, True, None, "many", "\x1b[31m\ud800", [], {}, [[]])


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to the parts of a JSON value; of a list its first."""
    yield path
    parts = [*value.items()] if isinstance(value, dict) else []
    parts += [(0, value[0])] if isinstance(value, list) and value else []
    for key, part in parts:
        yield from leaves(part, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another part at a path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


Index = dict[str, Any]
Change = Callable[[Index], Any]
"""From an index to what stands in its place."""

NAMES = (
    *("", ".", "..", "../x.mds", "../../x.mds", "a/b.mds", "./a.mds", "a/", "/tmp/x.mds", "//x"),
    *("..\\x.mds", "a\\b.mds", "C:\\x.mds", "C:x.mds", "\\\\host\\x.mds", "a\0b.mds", "a\nb.mds"),
    *("a\x1b[31m.mds", "a\u202eb.mds", "a\x85.mds", "a\ud800.mds", "~/x.mds", ".hidden", "-x.mds"),
    *("a b.mds", "x" * 129, "ä.mds"),
    *(None, 3, True, ["a.mds"], {"a": 1}),
)
"""That no shard's file may have."""

TAKEN = (
    *("shard.00000.00000.mds", "SHARD.00000.00000.mds", "index.json", "INDEX.JSON"),
    "features.json",
)
"""That another file has, on some disks at least."""

NUMBERS = (-1, 0, 10**13, 10**400, 1 << 32, 1.5, float("nan"), float("inf"), "7", True, None, [1])
"""That are no number of bytes or samples."""

ENCODINGS = (
    *sorted(get_mds_encodings() - {"str", "bytes"}),
    *("PKL", "pkl:", "pkl:1", "ndarray:float16", "ndarray:object:1,1", "ndarray:float16:1,1,1"),
    *("ndarray:float16:0,1", "ndarray:float16:99999999999,1", "", 3, None, ["str"]),
)
"""That no column may have."""


def shard(change: Callable[[Any], Any], number: int = 1) -> Change:
    """Change a shard's entry."""

    def changed(index: Index) -> Index:
        change(index["shards"][number])
        return index

    return changed


def entry(number: int = 1, **values: Any) -> Change:
    """Replace values of a shard's entry."""
    return shard(lambda e: e.update(values), number)


def raw(**values: Any) -> Change:
    """Replace values of what the index says of a shard's file."""
    return shard(lambda e: e["raw_data"].update(values))


def zipped(**values: Any) -> Change:
    """Say that a shard is compressed."""

    def change(e: Any) -> None:
        name = e["raw_data"]["basename"] + ".zstd"
        e["zip_data"] = {**e["raw_data"], "basename": name, **values}
        e["compression"] = "zstd"

    return shard(change)


def encoded(encoding: Any) -> Change:
    """Give the first column of every shard another encoding."""

    def change(index: Index) -> Index:
        for e in index["shards"]:
            e["column_encodings"] = [encoding, *e["column_encodings"][1:]]
        return index

    return change


def written(change: Change, folder: Path) -> bytes:
    """The index of a folder with a change, as a file."""
    return json.dumps(change(json.loads((folder / "index.json").read_bytes()))).encode()


CASES: list[tuple[str, Change]] = [
    *[("raw_data.basename", raw(basename=name)) for name in NAMES],
    *[("zip_data.basename", zipped(basename=name)) for name in NAMES],
    *[("raw_data.bytes", raw(bytes=number)) for number in NUMBERS],
    *[("zip_data.bytes", zipped(bytes=number)) for number in NUMBERS],
    *[("samples", entry(samples=number)) for number in NUMBERS],
    *[("column", encoded(encoding)) for encoding in ENCODINGS],
    *[("taken", raw(basename=name)) for name in TAKEN],
    *[("taken", zipped(basename=name)) for name in (*TAKEN, "shard.00000.00001.mds")],
    *[("compression", entry(compression=name)) for name in ("lz4", ["zstd"], 3, "")],
    ("zip_data", entry(compression="zstd")),
    ("zip_data", entry(compression="zstd", zip_data=7)),
    ("zip_data", entry(zip_data={"basename": "z", "bytes": 1, "hashes": {}})),
    *[("hashes", raw(hashes=hashes)) for hashes in (None, [], "a", {"a\nb": "00"})],
    *[("hashes", raw(hashes={"xxh64": digest})) for digest in (3, "", "\x1b[31m", "0" * 999)],
    *[("format", entry(format=value)) for value in ("json", "csv", None, 3)],
    *[("version", entry(version=value)) for value in (1, "2", True, None)],
    *[("version", lambda index, v=v: index | {"version": v}) for v in (1, 3, "2", None, True)],
    *[("shards", lambda index, v=v: index | {"shards": v}) for v in ([], {}, None, 3, "abc")],
    *[("shard 0", lambda index, v=v: index | {"shards": [v]}) for v in (None, 3, "a", [], {})],
    *[("raw_data", entry(raw_data=value)) for value in (None, [], 3, {})],
    *[
        ("column_names", entry(0, column_names=names))
        for names in (None, [], ["id"], ["id"] * 4, [1, 2, 3, 4], ["a\nb", "b", "c", "d"], "abcd")
    ],
    *[
        ("column_sizes", entry(0, column_sizes=sizes))
        for sizes in (None, [0] * 4, [8, None, None, None], ["a"] * 4, [True] * 4, [10**400] * 4)
    ],
    ("columns", entry(column_names=["answer", "id", "image", "text"])),
    *[("", lambda index, v=v: v) for v in ([], 3, None, "text", {})],
]
"""What the refusal names, and the change. `taken` is a name that another file has."""

DAMAGED = (
    *(b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"version": 2, "shards": [', b"\xed\xa0\x80"),
    *(b'{"version": 2, "shards": [], "x": "\\ud800"}', b'{"version": 2, "shards": ' + b"9" * 5000),
    b'{"version": 2, "shards": [' + b"[" * 40 + b"]" * 40 + b"]}",
)
"""Files that are no index at all."""
