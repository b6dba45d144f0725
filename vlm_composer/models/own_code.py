"""Refuse Hugging Face models that need Python code of their own: none of it is ever run.

`trust_remote_code=False` alone is not enough: transformers then takes its own class wherever it
knows the model type, asks the user about parts of a model, passes `backbone_kwargs` on, runs
`custom_generate/generate.py` of a folder unasked (4.53), and fetches attention kernels.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.models.auto.tokenization_auto import (
    TOKENIZER_MAPPING_NAMES,
    tokenizer_class_from_name,
)
from transformers.utils import cached_file

log = logging.getLogger(__name__)

_MODELS: dict[str, Any] = {
    "AutoConfig": CONFIG_MAPPING_NAMES,
    "AutoModel": MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoBackbone": MODEL_FOR_BACKBONE_MAPPING_NAMES,
}
"""Auto classes through which a tower or its parts are built, and their classes by model type."""
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_GENERATE = "custom_generate/generate.py"


def check_model_code(name: str, source: str, revision: str | None = None) -> None:
    """Refuse a model whose folder or configuration needs code that transformers does not have.

    Args:
        name: Hub id or folder, for messages and for the weights.
        source: Hub id or folder of the configuration.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: It needs such code, or its configuration is not JSON.
    """
    check_generate_code(name)
    check_config_code(name, _read(source, "config.json", revision))


def check_export_code(folder: str | Path) -> None:
    """Refuse an export that names other code than this project's, which stands at its top."""
    check_generate_code(str(folder))
    config = _read(str(folder), "config.json", None)
    check_config_code(str(folder), config | {"auto_map": {}})


def check_generate_code(name: str) -> None:
    """Refuse a folder with a `generate` of its own, which transformers would run unasked."""
    if Path(name, _GENERATE).exists():
        _refuse(name, _GENERATE)


def check_config_code(name: str, config: Any) -> None:
    """Refuse a configuration, as JSON, that names code or another model to be loaded.

    Raises:
        ValueError: It does.
    """
    for part in _objects(config):
        _check_names(name, part)
        for auto, ours in _MODELS.items():
            reference = _auto_map(name, "config.json", part).get(auto)
            _check_class(name, auto, reference, ours.get(str(part.get("model_type")), ()))
        for key in _ATTENTION:
            if "/" in str(part.get(key)):
                _refuse(name, f"config.json: {key}: {str(part[key])[:80]!r}")
        if part.get("backbone") is not None or part.get("backbone_kwargs"):
            raise ValueError(
                f"{name} names another model as a part of it (config.json: backbone: "
                f"{str(part.get('backbone'))[:80]!r}), which is not loaded; use a model that has "
                "its parts in its own files"
            )


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """Load a tokenizer by transformers' own class.

    Args:
        name: Hub id or folder.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: It needs code of its own, or its files do not describe a tokenizer.
        KeyError: transformers has no tokenizer for a model of that type.
        OSError: It cannot be read.
    """
    name = str(name)
    settings = _read(name, "tokenizer_config.json", revision)
    named = _auto_map(name, "tokenizer_config.json", settings)
    known: Any = ()
    if (chosen := settings.get("tokenizer_class")) is None:
        config = _read(name, "config.json", revision)
        check_config_code(name, config)
        chosen = config.get("tokenizer_class")
        known = dict[str, Any](TOKENIZER_MAPPING_NAMES).get(str(config.get("model_type")), ())
        named |= _auto_map(name, "config.json", config)
    _check_names(name, {"tokenizer_class": chosen})
    if chosen is not None:
        known = [each for each in (chosen, f"{chosen}Fast") if tokenizer_class_from_name(each)]
    _check_class(name, "AutoTokenizer", named.get("AutoTokenizer"), known)
    return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)


def _check_class(name: str, auto: str, reference: Any, known: Any) -> None:
    """Take transformers' class only for weights of a class of the same name."""
    references = reference if isinstance(reference, list | tuple) else [reference]
    classes = [str(one).rpartition(".")[2] for one in references if one is not None]
    stock = [known] if isinstance(known, str) else [each for each in known if each]
    stock += [each.removesuffix("Fast") for each in stock]
    unknown = [each for each in classes if each not in stock]
    if unknown or (isinstance(reference, list) and len(reference) != 2):
        _refuse(name, f"auto_map: {auto}: {str(reference)[:80]!r}")
    if classes:
        _say(f"{name} has code of its own for {classes[0]}, which is not run: transformers' is.")


def _check_names(name: str, part: dict[str, Any]) -> None:
    for key in ("model_type", "tokenizer_class"):
        if not isinstance(value := part.get(key), str | None):
            raise ValueError(f"{name}: {key} is {str(value)[:80]!r} and must be a name; correct it")


@functools.cache
def _say(line: str) -> None:
    log.warning("%s", line)


def _refuse(name: str, where: str) -> None:
    raise ValueError(
        f"{name} needs Python code of its own ({where}), which is not run; use a model and a "
        "tokenizer that transformers has classes for"
    )


def _auto_map(name: str, file: str, part: dict[str, Any]) -> dict[str, Any]:
    """The Auto classes for which code is named; a tokenizer's may be a list."""
    found = part.get("auto_map", {})
    if isinstance(found, list) and file == "tokenizer_config.json":  # as early versions wrote it
        return {"AutoTokenizer": found}
    if not isinstance(found, dict):
        raise ValueError(f"{name}: auto_map in {file} is not an object; correct it or remove it")
    return found


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _read(source: str, file: str, revision: str | None) -> dict[str, Any]:
    """A JSON object of a model's; empty where it has no such file."""
    path = cached_file(
        source, file, revision=revision or "main", _raise_exceptions_for_missing_entries=False
    )
    try:
        found = {} if path is None else json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {file} is not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{source}: {file} is not a JSON object; download it again")
    return found
