"""The longest prompts that a conversion has listed, against the run's `max_seq_len`."""

from __future__ import annotations

from typing import Any

from vlm_composer.assembly import assemble_template
from vlm_composer.config import TrainConfig
from vlm_composer.data.opening import read_of_conversion
from vlm_composer.data.schema import IMAGE_PLACEHOLDER
from vlm_composer.data.template import Template
from vlm_composer.mds.json_object import parse_object
from vlm_composer.preflight.finding import Findings

QUALITY = "quality.json"
_SHOWN = 60
"""Characters of a prompt in a message."""


def check_prompts(config: TrainConfig) -> Findings:
    """Find data sets with a prompt that leaves no token for an answer.

    It would end the run, at whatever batch it comes. A data set without statistics, as of another
    writer or an earlier version, says nothing.

    Args:
        config: The run; its tokenizer can be loaded.
    """
    found, template = Findings(), None
    for side, loader in config.loaders.items():
        for source in loader.sources.values():
            with found.failing():
                if prompts := _longest_prompts(source.place):
                    template = template or assemble_template(config)
                    _check(found, f"{side}: {source.place}", template, prompts)
    return found


def _longest_prompts(place: str) -> list[dict[str, Any]]:
    """The entries of `longest_prompts` for a folder of shards.

    Raises:
        ValueError: `quality.json` is not what `python -m convert` writes.
    """
    read = read_of_conversion(place, QUALITY)
    if read is None:
        return []
    content, folder = read
    try:
        quality = parse_object(content)
        prompts = quality.get("longest_prompts", {}).get(folder, [])
        return [{"bytes": int(one["bytes"]), "prompt": str(one["prompt"])} for one in prompts]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the {QUALITY} of {place} cannot be read ({error!r}); convert the data again, or "
            "delete it"
        ) from error


def _check(found: Findings, where: str, template: Template, prompts: list[dict[str, Any]]) -> None:
    lengths = [_length(template, one["prompt"]) for one in prompts]
    length, listed = max(zip(lengths, prompts, strict=True), key=lambda pair: pair[0])
    if length >= template.max_seq_len:
        prompt = listed["prompt"]
        least = "at least " if len(prompt.encode()) < listed["bytes"] else ""
        found.fail(
            f"{where} has a prompt of {least}{length} tokens with its image, and max_seq_len is "
            f"{template.max_seq_len}: no token is left for the answer to {prompt[:_SHOWN]!r}",
            f"set max_seq_len to more than {length}, or convert without it",
        )


def _length(template: Template, prompt: str) -> int:
    """Tokens of a prompt with its image, which stands behind what is listed of a long one."""
    placed = prompt if IMAGE_PLACEHOLDER in prompt else prompt + IMAGE_PLACEHOLDER
    return len(template.encode_prompt(placed))
