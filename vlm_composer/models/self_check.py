"""Whether what makes a frozen language model fast computes what the model computes.

Packed rows, a cut last layer, cached prompts and compiled blocks are exact for the architectures
that they were made for. Whether they are for the one at hand is found out, not looked up: each is
run on a copy of the loaded model, and its hidden states are compared with those that the stock
model gives for each sample alone.

The copy is in fp32, so that rounding is far below any other difference, and has one layer of each
kind: layers with the same modules, attributes and configuration differ in their weights alone, and
mix tokens in the same way. Noise on its small parameters brings out what a gate of zero would hide.

Shape suffixes: B samples, T tokens of the longest one, N tokens of all, A that predict an answer, D
width.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_composer.models.answer_layer import cut_last_layer
from vlm_composer.models.frozen import decoder_of
from vlm_composer.models.frozen_blocks import blocks_for_a_check, eagerly
from vlm_composer.models.ignore_index import IGNORE_INDEX
from vlm_composer.models.packed_attention import PACKED_ATTENTION, attention, can_pack
from vlm_composer.models.packing import PackedRows, pack
from vlm_composer.models.prompt_cache import PromptCache, read_prompt

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of a token's hidden state, relative to its norm, that counts as rounding."""
_OWN_DTYPE_TOLERANCE = 0.05
"""The same for a model that is run whole, in its own dtype."""
_LARGEST_COPY = 500_000_000
"""Parameters of a model that is copied whole."""
_NOISE = 0.02
_SMALL = 1 << 16
"""Parameters that take noise: gates, scales, biases, kernels of convolutions."""
_LENGTHS = (11, 5, 8)
"""Tokens of the samples: more than the kernel of a short convolution, and different."""
_PROMPT, _IMAGE, _ANSWER = 2, 1, 2
"""Tokens of each before its image, of its image, and of its answer."""
_SEED = 20


@dataclass(frozen=True)
class Levers:
    """What a language model is run with.

    Attributes:
        attention: transformers' name of its attention function where `packed_attention` is not
            used: for padded rows, prompts and generation.
        packs: The samples of a micro-batch as one row; else as a padded view.
        cuts_last_layer: The last layer's feed-forward at answers alone.
        caches_prompts: Keys and values of prompts can be kept.
        compiles_blocks: Compiled norms, rotary embeddings and feed-forwards.
        refused: What was found of those that are off and might be on.
    """

    attention: str
    packs: bool = False
    cuts_last_layer: bool = False
    caches_prompts: bool = False
    compiles_blocks: bool = False
    refused: tuple[str, ...] = ()


def check_levers(model: PreTrainedModel, *, compile_blocks: bool = False) -> Levers:
    """Find out which levers compute what a model computes.

    Args:
        model: A Hugging Face causal language model as it was loaded; it is left as it is. On the
            meta device there is nothing to compare, and its code decides.
        compile_blocks: Whether compiled blocks are wanted.

    Returns:
        The levers to use.

    Raises:
        ValueError: Not even a padded view gives what the model gives for each sample alone.
    """
    own = model.config._attn_implementation
    own = "sdpa" if own == PACKED_ATTENTION else own  # a copy of a model that has its levers
    if any(parameter.is_meta for parameter in model.parameters()):
        packs = can_pack(model)
        return Levers(own, packs, packs, packs, compile_blocks)
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEED)
        embeds_ND = _embeddings(model)
        check = _Check.of_layers(model, embeds_ND) or _Check.of_all(model, embeds_ND)
        levers = check.run(own, can_pack(model), compile_blocks)
    log.debug("Checked the language model in %.2f s.", time.monotonic() - started)
    return levers


class _Check:
    """Compares what levers give with what a model gives.

    Args:
        base: The decoder to run, on the CPU.
        embeds_ND: Embeddings of all samples.
        is_copy: Whether `base` is an fp32 copy, of which parts may be replaced.
    """

    def __init__(self, base: Any, embeds_ND: Tensor, *, is_copy: bool = True) -> None:
        self._base, self._is_copy = base, is_copy
        self._tolerance = TOLERANCE if is_copy else _OWN_DTYPE_TOLERANCE
        self._embeds_ND = embeds_ND.float() if is_copy else embeds_ND
        labels = [torch.full((n,), IGNORE_INDEX) for n in _LENGTHS]
        ids = [torch.arange(n) + 1 + 100 * sample for sample, n in enumerate(_LENGTHS)]
        for row, label in zip(ids, labels, strict=True):
            label[-_ANSWER:] = row[-_ANSWER:]
            row[_PROMPT : _PROMPT + _IMAGE] = 0
        self._rows = partial(pack, ids, labels, image_token_id=0)
        is_prompt_N = torch.cat([torch.arange(n) < _PROMPT for n in _LENGTHS])
        self._behind_prompts = (~is_prompt_N).nonzero().squeeze(1)
        with eagerly():
            self._expected_ND = self._alone("eager")

    @classmethod
    def of_layers(cls, model: PreTrainedModel, embeds_ND: Tensor) -> _Check | None:
        """Check a copy with one layer of each kind; None where a model cannot be cut like that."""
        base = decoder_of(model)
        depth = getattr(base.config, "num_hidden_layers", None)
        paths = [
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth
        ]
        if len(paths) != 1:
            return None
        stack: Any = base.get_submodule(paths[0])
        kinds = {_kind(layer, number, base.config): number for number, layer in enumerate(stack)}
        chosen = sorted(kinds.values())  # the last of each kind: the last layer is among them
        left_out = [layer for number, layer in enumerate(stack) if number not in chosen]
        probe = _copy(base, [*left_out, model.get_input_embeddings()])
        _keep_layers(probe, paths[0], chosen)
        try:
            return cls(probe, embeds_ND)
        except Exception as error:  # layers that read what others leave, say
            log.debug("A part of the language model cannot be run", exc_info=error)
            return None

    @classmethod
    def of_all(cls, model: PreTrainedModel, embeds_ND: Tensor) -> _Check:
        """Check a copy of the whole model, or a large model itself, in its own dtype."""
        base = decoder_of(model)
        is_copy = sum(p.numel() for p in base.parameters()) <= _LARGEST_COPY
        try:
            if is_copy:
                return cls(_copy(base, [model.get_input_embeddings()]), embeds_ND)
            return cls(base, embeds_ND, is_copy=False)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be run on embeddings "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); use another "
                "language model"
            ) from error

    def run(self, own: str, can_pack: bool, compile_blocks: bool) -> Levers:
        """Try every lever.

        Args:
            own: Name of the attention function that the model was loaded with.
            can_pack: Whether the model takes `packed_attention`.
            compile_blocks: Whether compiled blocks are wanted.

        Returns:
            Those that are exact.

        Raises:
            ValueError: Not even a padded view is.
        """
        refused: list[str] = []

        def holds(lever: str, compute: Callable[[], Tensor], rows: Tensor | None = None) -> bool:
            problem = self._difference(compute, rows)
            if problem is not None:
                refused.append(f"{lever}: {problem}")
            return problem is None

        rows = self._rows()
        alone = holds(f"{own} attention", lambda: self._alone(own))
        levers = Levers(own if alone else "eager")
        if can_pack and not self._is_copy:
            refused.append("packed rows: layers could not be looked at one by one")
        if can_pack and self._is_copy and holds("packed rows", lambda: self._packed(rows)):
            levers = replace(levers, packs=True)
            if holds("cached prompts", self._with_cached_prompts):
                levers = replace(levers, caches_prompts=True)
            layers = getattr(self._base, "layers", [None])
            last = layers[-1]
            if cut_last_layer(self._base):
                cut = holds("cut last layer", lambda: self._packed(rows), rows.answer_rows)
                levers = replace(levers, cuts_last_layer=cut)
                layers[-1] = last
        elif problem := self._difference(lambda: self._padded(rows, levers.attention), None):
            raise ValueError(
                f"{type(self._base).__name__} does not give for a sample in a batch what it gives "
                f"for it alone ({problem}): it cannot be trained against; use a causal language "
                "model"
            )
        if compile_blocks and self._is_copy:

            def with_blocks() -> Tensor:
                if levers.packs:
                    return self._packed(rows)
                return self._padded(rows, levers.attention)

            with blocks_for_a_check(self._base) as blocks:
                if not blocks or holds("compiled blocks", with_blocks):
                    levers = replace(levers, compiles_blocks=True)
        return replace(levers, refused=tuple(refused))

    def _difference(self, compute: Callable[[], Tensor], rows: Tensor | None) -> str | None:
        """Say how what a lever gives differs from what the model gives; None where it does not."""
        expected = self._expected_ND if rows is None else self._expected_ND[rows]
        try:
            with eagerly():
                found = compute()
        except Exception as error:  # an architecture's own code, which was not made for this
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if found.shape != expected.shape:
            return f"hidden states of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        norms = expected.norm(dim=-1).clamp(min=torch.finfo(expected.dtype).tiny)
        largest = ((found - expected).norm(dim=-1) / norms).max().item()
        if largest <= self._tolerance:
            return None
        return f"hidden states differ by {100 * largest:.2g} %"

    def _packed(self, rows: PackedRows, prompts: Any = None) -> Tensor:
        embeds_ND = self._embeds_ND
        if prompts is not None:
            embeds_ND = embeds_ND[self._behind_prompts]
        with attention(self._base.config, PACKED_ATTENTION):
            return self._decode(
                embeds_ND[None],
                position_ids=rows.position_ids[None],
                packing=rows,
                prompts=prompts,
            )[0]

    def _alone(self, name: str) -> Tensor:
        """Hidden states of each sample alone, by an attention function of transformers."""
        with attention(self._base.config, name):
            samples = self._embeds_ND.split(_LENGTHS)
            return torch.cat([self._decode(sample[None])[0] for sample in samples])

    def _padded(self, rows: PackedRows, name: str) -> Tensor:
        with attention(self._base.config, name):
            return rows.unpad(self._decode(rows.pad(self._embeds_ND)))

    def _with_cached_prompts(self) -> Tensor:
        """Hidden states as if of all tokens: those of the prompts are the model's own."""
        rows = self._rows(split_prompts=True)
        starts = dict(zip(rows.prompts, self._embeds_ND.split(_LENGTHS), strict=True))
        cache = PromptCache(lambda prompt: read_prompt(self._base, starts[prompt][: len(prompt)]))
        found = self._packed(rows, cache.rows(rows.prompts))
        whole = self._expected_ND.clone()
        whole[self._behind_prompts] = found
        return whole

    def _decode(self, embeds: Tensor, **options: Any) -> Tensor:
        return self._base(inputs_embeds=embeds, use_cache=False, **options).last_hidden_state


def _embeddings(model: PreTrainedModel) -> Tensor:
    """Embeddings of random tokens."""
    table: Any = model.get_input_embeddings()
    weight = table.weight
    return table(torch.randint(weight.shape[0], (sum(_LENGTHS),), device=weight.device)).cpu()


def _copy(base: nn.Module, without: Sequence[Any]) -> Any:
    """Copy a decoder to fp32 on the CPU, with noise on its small parameters.

    Args:
        base: The decoder.
        without: Modules that the copy has nothing in place of.
    """
    probe = copy.deepcopy(base, {id(module): nn.Identity() for module in without})
    probe.float().to("cpu").eval()
    for parameter in probe.parameters():
        if parameter.numel() <= _SMALL:
            parameter.data += _NOISE * torch.randn_like(parameter)
    thing: Any
    for thing in (probe.config, *probe.modules()):  # a longer sample is refused, not packed
        if isinstance(getattr(thing, "sliding_window", None), int):
            thing.sliding_window = max(thing.sliding_window, 2 * max(_LENGTHS))
    return probe


def _kind(layer: nn.Module, number: int, config: Any) -> Hashable:
    """What layers have in common that differ in their weights alone."""
    modules = tuple(
        (
            *(name, type(module)),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, str | int | float | None) and not _is_index(key)
            ),
        )
        for name, module in layer.named_modules()
    )
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    lists = tuple(repr(values[number]) for _, values in _lists_of_layers(config))
    return modules, shapes, lists


def _lists_of_layers(config: Any) -> list[tuple[str, list[Any]]]:
    """What a configuration says of each layer."""
    depth = config.num_hidden_layers
    return [
        (key, value)
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == depth
    ]


def _is_index(attribute: str) -> bool:
    return any(part in attribute for part in ("idx", "index", "layer_id", "layer_number"))


def _keep_layers(probe: Any, path: str, chosen: Sequence[int]) -> None:
    """Leave a copy some of its layers, which then are all that it knows of."""
    parent, _, name = path.rpartition(".")
    stack = probe.get_submodule(path)
    setattr(probe.get_submodule(parent), name, nn.ModuleList(stack[i] for i in chosen))
    for key, values in _lists_of_layers(probe.config):
        setattr(probe.config, key, [values[number] for number in chosen])
    probe.config.num_hidden_layers = len(chosen)
    for new, old in enumerate(chosen):
        for module in stack[old].modules():
            for key, value in list(vars(module).items()):
                if _is_index(key) and value in (old, old + 1):
                    setattr(module, key, new + value - old)
