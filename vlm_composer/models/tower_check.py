"""Whether a Hugging Face model can be a tower here, seen from its configuration alone.

The model is built without weights and does what training will do with it on fake tensors (torch's
`FakeTensorMode`), which have shapes and no contents. Of its layers two of each kind are run.

Shape suffixes: N tokens, D width, A tokens that predict an answer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from vlm_composer.models.fake_tensors import fake_weights, operations, runs_on_fakes
from vlm_composer.models.frozen import ArchitectureError
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.packing import PackedRows, pack
from vlm_composer.models.tower_loading import EXAMPLES, build_empty, check_kind
from vlm_composer.models.vision_layers import PatchesError
from vlm_composer.models.vision_tower import VisionTower

log = logging.getLogger(__name__)


def check_vision_model(
    name: str,
    config: PretrainedConfig,
    *,
    layer: int = -1,
    image_size: int | None = None,
    attn_implementation: str | None = None,
) -> None:
    """Refuse a vision model that does not give the patches of its images.

    Args:
        name: What messages call it.
        config: Its configuration.
        layer: As `VisionTower`'s.
        image_size: As `VisionTower`'s.
        attn_implementation: As `load_vision_model`'s.

    Raises:
        ValueError: It cannot be used, or not with this layer or image size.
    """
    with _named(name, config, AutoModel, "vision tower"):
        _try_vision_model(_Shape.of(config), layer, image_size, attn_implementation)


def check_language_model(name: str, config: PretrainedConfig) -> int:
    """Refuse a language model through which no connector is trained; arguments as above.

    Returns:
        Rows of its embedding table.

    Raises:
        ValueError: It cannot be used.
    """
    with _named(name, config, AutoModelForCausalLM, "language model"):
        return _try_language_model(_Shape.of(config))


@dataclass(frozen=True)
class _Shape:
    """A configuration that is compared by what is in it."""

    text: str
    config: PretrainedConfig = field(compare=False)

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Shape:
        return cls(f"{type(config)} {config.to_json_string(use_diff=False)}", config)


@functools.lru_cache(maxsize=16)  # preflight asks, and then whatever builds the model
def _try_vision_model(
    shape: _Shape, layer: int, image_size: int | None, attn_implementation: str | None
) -> None:
    for key in ("image_size", "patch_size", "hidden_size", "num_hidden_layers"):
        value = getattr(shape.config, key, None)
        if not isinstance(value, int):
            found = f"no {key}" if value is None else f"{key} {value}"
            raise ArchitectureError(f"its configuration has {found}, and one number is needed")
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}

    def build() -> VisionTower:
        with _reason(f"it cannot be built from its configuration {options or ''}".rstrip()):
            model = build_empty(AutoModel, shape.config, **options)
        return VisionTower(model, layer=layer, image_size=image_size)

    with torch.device("meta"):
        tower, own = build(), shape.config.image_size
    _keep_kinds_of_layers(_stacks(tower.model))
    reason = f"it does not run on images of {tower.image_size} × {tower.image_size} pixels alone"
    if tower.image_size != own:
        reason += f" (its own are {own} × {own})"
    with _reason(reason):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake_weights(tower, mode)
        if not runs_on_fakes(mode, lambda: _check_patches(tower)):
            tower = build()  # to be run for real, but for its layers, which change no shape
            _remove_layers(_stacks(tower.model))
            for module in tower.modules():
                for key, weight in module._parameters.items():
                    if weight is not None:
                        zeros = torch.zeros_like(weight, device="cpu")
                        module._parameters[key] = nn.Parameter(zeros, requires_grad=False)
            _check_patches(tower)


def _check_patches(tower: VisionTower) -> None:
    side = tower.image_size
    patches = tower(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    needed = (2, tower.num_patches, tower.hidden_size)
    if tuple(patches.shape) != needed:
        raise ArchitectureError(
            f"it gave {tuple(patches.shape)} for 2 images, and patches {needed} are needed"
        )


@functools.lru_cache(maxsize=16)
def _try_language_model(shape: _Shape) -> int:
    with _reason("it cannot be built from its configuration"), torch.device("meta"):
        model = build_empty(AutoModelForCausalLM, shape.config)
    for key, value in (("is_decoder", False), ("causal", False), ("attn_type", "bi")):
        if any(getattr(module, key, None) == value for module in model.modules()):
            raise ArchitectureError(f"it is not causal ({key}: {value})")
    with _reason("it has no embedding table and linear head of its own"):
        llm = LanguageModel(model)
        table_rows = llm.vocab_size
        with torch.device("meta"):
            llm.ensure_rows(table_rows + 1)  # as <image_patch> may need
    stacks = _stacks(model)
    _keep_kinds_of_layers(stacks)
    ids = [torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]
    rows = pack(ids, ids, image_token_id=table_rows)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_weights(llm, mode)
    with _reason("its decoder does not run on embeddings (inputs_embeds) alone"):
        knows = runs_on_fakes(mode, lambda: _check_decoder(llm, rows))
    if not knows:  # what stands around the layers can be known all the same
        _remove_layers(stacks)
    with _reason("it does not run on token ids alone"):
        runs_on_fakes(mode, lambda: _check_around_decoder(llm))
    return table_rows


def _check_decoder(llm: LanguageModel, rows: PackedRows) -> None:
    """Run a micro-batch forward and backward."""
    versions = [parameter._version for parameter in llm.parameters()]
    embeds_ND = llm.embed(rows.input_ids).detach().requires_grad_()
    hidden_AD = llm.decode(embeds_ND * 1, rows)  # a model may write to what it is given
    needed = (len(rows.targets), llm.hidden_size)
    if tuple(hidden_AD.shape) != needed:
        raise ArchitectureError(
            f"its decoder gave {tuple(hidden_AD.shape)}, and hidden states {needed} are needed"
        )
    llm.head(hidden_AD, rows.targets).backward()
    if versions != [parameter._version for parameter in llm.parameters()]:
        raise ArchitectureError("it changes its own weights, which must stay frozen")


def _check_around_decoder(llm: LanguageModel) -> None:
    """See that from ids to logits there are a table, the decoder, a linear head, and no more.

    What a model does beside them, such as scaling its logits, training would leave out.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64)
    model, decoder, options = llm.model, llm.decoder, {"use_cache": False}
    if llm.packs:
        model.config._attn_implementation = "eager"
    embeds, in_table = operations(lambda: llm.embed(ids))
    output, in_decoder = operations(lambda: decoder(inputs_embeds=embeds, **options))
    _, in_head = operations(lambda: llm.head(output.last_hidden_state))
    _, from_ids = operations(lambda: model(input_ids=ids, **options))
    _, from_embeds = operations(lambda: model(inputs_embeds=embeds, **options))
    for what, more in (
        ("its embeddings are more than rows of a table", from_ids - from_embeds - in_table),
        ("its logits are more than a linear head's", from_embeds - in_decoder - in_head),
    ):
        if more:
            raise ArchitectureError(
                f"{what} ({', '.join(sorted(more))}), which training would leave out"
            )


def _stacks(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Where the lists of layers are: parents and names."""
    depth = getattr(model.config, "num_hidden_layers", None)
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]


def _keep_kinds_of_layers(stacks: list[tuple[nn.Module, str]]) -> None:
    """Cut stacks of layers to two of each kind: those of the same parts do the same."""
    for parent, name in stacks:
        kept, kinds = nn.ModuleList(), Counter[str]()
        for layer in getattr(parent, name):
            kind = f"{layer} {getattr(layer, 'attention_type', '')}"
            kinds[kind] += 1
            if kinds[kind] <= 2:
                kept.append(layer)
        setattr(parent, name, kept)


def _remove_layers(stacks: list[tuple[nn.Module, str]]) -> None:
    for parent, name in stacks:
        setattr(parent, name, nn.ModuleList())


@contextlib.contextmanager
def _reason(reason: str) -> Iterator[None]:
    """Give a reason for whatever the code of an architecture raises."""
    try:
        yield
    except ArchitectureError:
        raise
    except PatchesError as error:
        raise ArchitectureError(str(error)) from error
    except ImportError as error:
        line = " ".join(str(error).split()).partition(". ")[0]
        raise ArchitectureError(f"it needs what is not installed: {line}") from error
    except Exception as error:
        raise ArchitectureError(reason) from error


@contextlib.contextmanager
def _named(name: str, config: PretrainedConfig, auto: Any, part: str) -> Iterator[None]:
    """Say which model cannot be which part, and what to use."""
    check_kind(auto, name, config)
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # what it warns of, such as a resized table, is not so
    try:
        # Models are built on the CPU whatever the caller's device, and its generator stays.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            yield
    except ArchitectureError as error:
        log.debug("%s cannot be a %s", name, part, exc_info=True)
        architecture = auto._model_mapping[type(config)].__name__
        raise ValueError(
            f"{name} is a {config.model_type} ({architecture}), which cannot be a {part} here: "
            f"{error}; use {EXAMPLES[auto]}"
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
