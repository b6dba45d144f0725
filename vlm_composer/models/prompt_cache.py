"""Keys and values of prompts that many samples begin with.

What precedes the image is text alone, read by a frozen model: its keys and values never change and
need no gradient. LLaVA-Pretrain has about a dozen prompts.

Shape suffixes: P tokens of a prompt, Q tokens of the prompts of a micro-batch, R tokens of all
prompts seen, G key and value heads, C width of a head, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MANY_PROMPTS = 1000
"""Prompts at which a warning says that the data may not be what the cache is for."""

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values (tokens, G, C) of each layer."""


@dataclass(frozen=True)
class PromptRows:
    """Keys and values of the prompts of a micro-batch.

    Attributes:
        layers: Keys and values (R, G, C) of each layer.
        index: (Q,) rows of them, in the order of `PackedRows.prompt_places`.
    """

    layers: Layers
    index: Tensor

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (Q, G, C) of a layer."""
        keys, values = self.layers[layer]
        return keys.index_select(0, self.index), values.index_select(0, self.index)


def read_prompt(decoder: Any, embeds_PD: Tensor) -> Layers:
    """Run a decoder over the embeddings of a prompt and take keys and values from its cache."""
    cache = decoder(inputs_embeds=embeds_PD[None], use_cache=True).past_key_values
    return [
        (keys[0].transpose(0, 1), values[0].transpose(0, 1))
        for keys, values in zip(cache.key_cache, cache.value_cache, strict=True)
    ]


class PromptCache:
    """Reads each prompt once.

    A prompt is read alone, so that its values are the same whatever stands beside it: a resumed run
    has those of the run it goes on from.

    Args:
        read: Returns keys and values (P, G, C) of each layer for the token ids of a prompt.
    """

    def __init__(self, read: Callable[[tuple[int, ...]], Layers]) -> None:
        self._read = read
        self._starts: dict[tuple[int, ...], int] = {(): 0}
        self._layers: Layers = []

    def rows(self, prompts: Sequence[tuple[int, ...]]) -> PromptRows | None:
        """Return the rows of the prompts of a micro-batch; None where all of them are empty."""
        if not any(prompts):
            return None
        for prompt in prompts:
            if prompt not in self._starts:
                self._add(prompt)
        index = [self._starts[prompt] + place for prompt in prompts for place in range(len(prompt))]
        device = self._layers[0][0].device
        return PromptRows(self._layers, torch.tensor(index).to(device, non_blocking=True))

    def _add(self, prompt: tuple[int, ...]) -> None:
        self._starts[prompt] = len(self._layers[0][0]) if self._layers else 0
        with torch.no_grad():
            read = self._read(prompt)
        self._layers = [
            (torch.cat([keys, more_keys]), torch.cat([values, more_values]))
            for (keys, values), (more_keys, more_values) in zip(
                self._layers or [(k[:0], v[:0]) for k, v in read], read, strict=True
            )
        ]
        if len(self._starts) == MANY_PROMPTS:
            log.warning(
                "%d different prompts were read one by one; for data whose prompts differ set "
                "cache_prompts: false.",
                MANY_PROMPTS,
            )
