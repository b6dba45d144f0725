"""Schema of a checkpoint: what its document and its tensors must be, before any of it is used.

Whoever can write a file can give it right hashes, so that a whole file may still say anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHTS = "weights."
"""Prefix of the names of the trained weights; other tensors belong to the optimizer and the random
generators."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, each of the shape of its weight."""
CLOCKS = ("total_wct", "iteration_wct", "epoch_wct", "batch_wct")
"""Entries of the timestamp in seconds; the others are counts."""
_MAX_DEPTH = 16
_REAL = {"F64", "F32", "F16", "BF16"}


class Rule(NamedTuple):
    """What a value must be, in words, and whether one is."""

    expected: str
    holds: Callable[[Any], bool]


Schema = Rule | Mapping[str, "Schema"]
"""A rule, or for each key that an object must have its own schema."""


def _is_whole(value: Any, end: int = 2**63) -> bool:
    return type(value) is int and 0 <= value < end


def _is_finite(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)


def _are(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _is_twister(words: Any, place: Any) -> bool:
    """Whether it is the state of a Mersenne Twister; numpy does not look at `place`."""
    return _are(words, lambda word: _is_whole(word, 2**32)) and (
        len(words) == 624 and _is_whole(place, 625)
    )


def _is_numpy_state(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 5):
        return False
    kind, words, place, has_gauss, gauss = value
    known = kind == "MT19937" and _is_twister(words, place)
    return known and _is_whole(has_gauss, 2) and _is_finite(gauss)


def _is_python_state(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[1], list)):
        return False
    version, words, gauss = value
    known = type(version) is int and version == 3 and _is_twister(words[:-1], *words[-1:] or [None])
    return known and (gauss is None or _is_finite(gauss))


_COUNT = Rule("a whole number of 0 or more", _is_whole)
_NUMBER = Rule("a number", lambda value: type(value) in (int, float))
_SECONDS = Rule("seconds of 0 or more", lambda value: _is_finite(value) and 0 <= value < 1e12)
_TEXT = Rule("text", lambda value: isinstance(value, str))
_TEXT_OR_NULL = Rule("text or null", lambda value: value is None or isinstance(value, str))
_OBJECT = Rule("an object", lambda value: isinstance(value, dict))
TEXTS = Rule(
    "an object of texts",
    lambda value: isinstance(value, dict) and all(isinstance(x, str) for x in value.values()),
)
_LINES = {
    "bytes": Rule(
        "a whole number of 0 or more, or null", lambda value: value is None or _is_whole(value)
    )
}
_NUMBERS = Rule("a list of numbers", lambda value: _are(value, _NUMBER.holds))
_TOWER: Schema = {
    "name": _TEXT,
    "revision": _TEXT_OR_NULL,
    "dtype": Rule("float32 or bfloat16", lambda value: value in ("float32", "bfloat16")),
    "config_hash": _TEXT,
    "weights_hash": _TEXT,
}
TOWERS: Schema = {"vision_tower": _TOWER, "language_model": _TOWER}
"""Of the identity of both towers."""
CALLBACKS: Mapping[str, Schema] = {
    "MetricsFile": _LINES,
    "LiveWarnings": {
        **_LINES,
        "losses": _NUMBERS,
        "norms": _NUMBERS,
        "exploded": Rule(
            "a list of true and false", lambda value: _are(value, lambda x: type(x) is bool)
        ),
        "warned_at": Rule(
            "an object of whole numbers",
            lambda value: isinstance(value, dict) and all(map(_is_whole, value.values())),
        ),
    },
    "CutAnswers": {"answers": _COUNT, "tokens": _COUNT},
    "SpeedMonitor": {"total_eval_wct": _SECONDS},
}
"""Of each callback that keeps a state; no other is given one."""
EXPORT: Schema = {"connector": {"hashes": TEXTS}, "towers": TOWERS}
"""Of what an export says of itself, as far as a run starts from it."""
DOCUMENT: Schema = {
    "hashes": TEXTS,
    "timestamp": {
        **dict.fromkeys(
            (
                *("iteration", "epoch", "batch", "sample", "token", "epoch_in_iteration"),
                *("token_in_iteration", "batch_in_epoch", "sample_in_epoch", "token_in_epoch"),
            ),
            _COUNT,
        ),
        **dict.fromkeys(CLOCKS, _SECONDS),
    },
    "lr": Rule(
        "a list of one learning rate",
        lambda value: _are(value, _is_finite) and len(value) == 1 and value[0] >= 0,
    ),
    "dataset": {
        "epoch": _COUNT,
        "sample_in_epoch": _COUNT,
        "num_canonical_nodes": Rule(
            "a whole number from 1 to 1,000,000",
            lambda value: _is_whole(value, 1_000_001) and value > 0,
        ),
        "shuffle_seed": _COUNT,
        "initial_physical_nodes": Rule(
            "a whole number from 1 to 1,000,000",
            lambda value: _is_whole(value, 1_000_001) and value > 0,
        ),
    },
    "data": _OBJECT,
    "callbacks": _OBJECT,
    "rng": Rule("a list of objects", lambda value: _are(value, _OBJECT.holds)),
    "world_size": Rule("a whole number of 1 or more", lambda value: _is_whole(value) and value > 0),
    "versions": TEXTS,
    "towers": TOWERS,
    "settings": {"train_loader": {"dataset": _OBJECT}},
}
"""Of a checkpoint's document. Entries beside these are not used."""
_RNG: Schema = {
    "numpy": Rule("the state of numpy's MT19937", _is_numpy_state),
    "python": Rule("the state of Python's random", _is_python_state),
}


def document_fault(document: Any) -> str | None:
    """Return what is wrong with a checkpoint's document, with field and value; None if nothing."""
    if _is_too_deep(document):
        return f"its document is nested deeper than {_MAX_DEPTH} levels"
    if fault := schema_fault(document, DOCUMENT):
        return fault
    for name in CALLBACKS.keys() & document["callbacks"].keys():
        if fault := schema_fault(document["callbacks"][name], CALLBACKS[name], f"callbacks.{name}"):
            return fault
    for rank, generators in enumerate(document["rng"]):
        if fault := schema_fault(generators, _RNG, f"rng.{rank}"):
            return fault
    if len(document["rng"]) != document["world_size"]:
        return f"rng has {len(document['rng'])} entries, world_size is {document['world_size']}"
    positions = [document[part]["sample_in_epoch"] for part in ("dataset", "timestamp")]
    if positions[0] != positions[1]:
        return "dataset.sample_in_epoch is {}, timestamp.sample_in_epoch {}".format(*positions)
    return None


def schema_fault(value: Any, schema: Schema, field: str = "") -> str | None:
    """Return the first field of a JSON value that is not as its schema says; None if all are."""
    if isinstance(schema, Rule):
        if schema.holds(value):
            return None
        return f"{field} is {repr(value)[:80]}, expected {schema.expected}"
    if not isinstance(value, dict):
        return f"{field or 'its document'} is {repr(value)[:80]}, expected an object"
    for key, inner in schema.items():
        name = f"{field}.{key}" if field else key
        if key not in value:
            return f"{name} is missing"
        if fault := schema_fault(value[key], inner, name):
            return fault
    return None


def tensors_fault(
    kinds: Mapping[str, tuple[str, list[int]]], world_size: int, read: Callable[[str], Tensor]
) -> str | None:
    """Return what is wrong with the tensors of a checkpoint; None if nothing.

    Args:
        kinds: Of each tensor its dtype, as safetensors names it, and its shape.
        world_size: How many ranks have a random state.
        read: Reads a tensor, by its name.
    """
    weights = [name.removeprefix(WEIGHTS) for name in kinds if name.startswith(WEIGHTS)]
    expected = {WEIGHTS + weight for weight in weights}
    expected |= {f"optimizer.{part}.{weight}" for part in (*MOMENTS, "step") for weight in weights}
    expected |= {f"rng.{rank}.torch" for rank in range(world_size)}
    optional = {f"rng.{rank}.cuda" for rank in range(world_size)}
    if not weights:
        return "it has no trained weights"
    if fault := _names_fault(kinds.keys(), expected, optional):
        return fault
    for name, (dtype, shape) in kinds.items():
        part = name.split(".")[1] if name.startswith("optimizer.") else ""
        if name.startswith("rng."):
            if fault := _generator_fault(name, dtype, shape, read):
                return fault
        elif dtype not in _REAL:
            return f"{name} has dtype {dtype}, expected real numbers ({', '.join(sorted(_REAL))})"
        elif part in MOMENTS:
            weight = kinds[WEIGHTS + name.removeprefix(f"optimizer.{part}.")][1]
            if shape != weight:
                return f"{name} has shape {tuple(shape)}, its weight has {tuple(weight)}"
        elif part == "step" and (shape or not 0 <= float(read(name)) < math.inf):
            value = f"of shape {tuple(shape)}" if shape else float(read(name))
            return f"{name} is {value}, expected one finite number of 0 or more"
    return None


def _names_fault(
    found: Collection[str], expected: Collection[str], optional: Collection[str]
) -> str | None:
    missing, extra = sorted({*expected} - {*found}), sorted({*found} - {*expected} - {*optional})
    if missing:
        return f"it lacks {missing[0]}"
    return f"it holds {extra[0][:80]}, which belongs to no weight and no rank" if extra else None


def _generator_fault(
    name: str, dtype: str, shape: list[int], read: Callable[[str], Tensor]
) -> str | None:
    """Check a random generator's state; torch checks that of a CPU itself."""
    size = [16] if name.endswith(".cuda") else [torch.get_rng_state().numel()]
    if dtype != "U8" or shape != size:
        return f"{name} has dtype {dtype} and shape {tuple(shape)}, expected U8 and {tuple(size)}"
    if name.endswith(".torch"):
        try:
            torch.Generator().set_state(read(name))
        except RuntimeError as error:
            return f"{name} is not the state of a generator: {str(error).splitlines()[0]}"
    return None


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)
