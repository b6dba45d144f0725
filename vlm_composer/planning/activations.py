"""Memory of a micro-batch, measured on tensors that have shapes and no contents.

The model's own forward and backward run at their real size under torch's `FakeTensorMode`, and
every storage that an operation makes is counted from then until torch frees it. Nothing is
estimated from formulas; what a kernel takes inside itself (workspaces) is not seen.

The fake tensors stand on a "cpu", for torch makes no backward on fake CUDA tensors where there is
no GPU. Two things differ from a GPU by that and are put right or told: attention within samples is
replaced by the signature of torch's flash kernel, which is what a GPU runs in bf16; and autocast is
the CPU's, which treats the connector's layers alike.

The figure is an upper bound: blocks are not compiled (`compile_blocks` keeps less for the
backward), prompts are not cached (`cache_prompts` leaves their rows out) and no layer is computed
twice (`activation_checkpointing`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_composer.models.fake_tensors import NEED_NUMBERS, fake_weights
from vlm_composer.models.packed_attention import attention_kernel
from vlm_composer.models.packing import IGNORE_INDEX, PackedRows, pack
from vlm_composer.models.vlm import AnswerLoss, VisionLanguageModel

PROMPT_TOKENS, ANSWER_TOKENS = 9, 24
"""Text tokens of a sample that are planned with where nothing else is said: LLaVA-Pretrain has
about as many before an answer, and in it with the end-of-text token."""


@dataclass(frozen=True)
class ActivationBytes:
    """Memory of one micro-batch above weights, gradients and optimizer.

    Attributes:
        kept: What is alive between forward and backward: what autograd keeps, the batch, autocast's
            copies of weights.
        peak: The most that is alive at a time, in the vision tower, the head's chunk of logits or
            the backward.
    """

    kept: int
    peak: int


class InconclusiveError(ValueError):
    """Memory cannot be estimated without weights."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while it is active.

    Attributes:
        now: Bytes that are alive.
        peak: Most of them at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Storages that come in were made before, or are known: views give them back.
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def measure_activations(
    model: VisionLanguageModel,
    *,
    microbatch_size: int,
    prompt_tokens: int,
    answer_tokens: int,
    autocast_dtype: torch.dtype | None = torch.bfloat16,
) -> ActivationBytes:
    """Run a micro-batch without contents and see what it holds.

    The weights of `model` are replaced by fake ones: it cannot be used for anything else after.

    Args:
        model: On the meta device, its blocks not compiled.
        microbatch_size: Samples.
        prompt_tokens: Text tokens of a sample, which stand before its image.
        answer_tokens: Answer tokens of a sample.
        autocast_dtype: Of the connector's arithmetic; None for fp32.

    Returns:
        The bytes, for the flash attention of a GPU.

    Raises:
        InconclusiveError: What the model computes depends on its weights.
    """
    mode = FakeTensorMode()
    fake_weights(model, mode)
    images, rows = sample_batch(model, microbatch_size, prompt_tokens, answer_tokens)
    images, rows = fake_batch(mode, images, rows)
    try:
        with mode, attention_kernel(_flash_attention):
            return measure_step(model, images, rows, autocast_dtype)
    except NEED_NUMBERS as error:
        raise InconclusiveError(
            "memory of a micro-batch is inconclusive: what a tower computes depends on its "
            "weights, as where experts are chosen; try one step on the device"
        ) from error


def measure_step(
    model: VisionLanguageModel,
    images: Tensor,
    rows: PackedRows,
    autocast_dtype: torch.dtype | None = None,
) -> ActivationBytes:
    """Run forward and backward of a micro-batch and count, on real tensors as on fake ones.

    Args:
        model: On the CPU.
        images: As the model takes them; they count.
        rows: Likewise.
        autocast_dtype: None for no autocast.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            # Gradients exist from the second micro-batch on, where memory is highest.
            parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        # Inputs are made anew, so that they count as the batch that a rank holds.
        images = images.clone()
        with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
            outputs = model(images, rows)
            assert isinstance(outputs, AnswerLoss)
            loss = outputs.total / max(outputs.num_tokens, 1)
            kept = live.now
        loss.backward()
    return ActivationBytes(kept, live.peak)


def sample_batch(
    model: VisionLanguageModel, microbatch_size: int, prompt_tokens: int, answer_tokens: int
) -> tuple[Tensor, PackedRows]:
    """Make a micro-batch of equal samples: prompt, image, answer. Arguments as above."""
    image = model.image_token_id
    text = 0 if image else 1  # any id but that of the image
    num_image = model.connector.num_image_tokens
    ids = torch.tensor([text] * prompt_tokens + [image] * num_image + [text] * answer_tokens)
    labels = ids.clone()
    labels[: prompt_tokens + num_image] = IGNORE_INDEX
    rows = pack(
        [ids] * microbatch_size,
        [labels] * microbatch_size,
        image_token_id=image,
    )
    side = model.vision_tower.image_size
    return torch.zeros(microbatch_size, 3, side, side, dtype=torch.uint8), rows


def fake_batch(mode: FakeTensorMode, images: Tensor, rows: PackedRows) -> tuple[Tensor, PackedRows]:
    """Fake what was packed from real integers, whose lengths the host knows."""
    tensors: dict[str, Any] = {
        field.name: mode.from_tensor(getattr(rows, field.name))
        for field in fields(rows)
        if isinstance(getattr(rows, field.name), Tensor)
    }
    return mode.from_tensor(images), replace(rows, **tensors)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention (B, T, H, C) as torch's CUDA flash kernel: grouped heads are not copied."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(*heads_first, 0.0, True, scale=scale)[0].transpose(1, 2)
