"""Packing: the samples of a micro-batch as one row of tokens without padding.

Every linear layer, norm and embedding works on the N tokens of all samples; attention alone needs
to know where a sample ends, see `packed_attention`. Prompts that many samples begin with can be
left out: their keys and values are constants, see `prompt_cache`.

Shape suffixes: N tokens of all samples, B samples, T tokens of the longest one, M image tokens, A
tokens that predict an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_composer.models.ignore_index import IGNORE_INDEX


@dataclass(frozen=True)
class PackedRows:
    """The token rows of a micro-batch, packed.

    Lengths and counts are known to the host, so that a GPU is never waited for.

    Attributes:
        input_ids: (N,) token ids of all samples, one after the other.
        position_ids: (N,) position of each token within its sample.
        to_padded: (B × T,) for each place of the padded view the packed row that stands there; row
            0 at padding.
        to_packed: (N,) for each packed row its place in the padded view.
        image_rows: (M,) rows of the image tokens.
        answer_rows: (A,) rows that predict an answer token: those before each.
        targets: (A,) token ids that they predict.
        prompt_places: For each token of `prompts` its place in the padded view.
        lengths: B lengths in tokens, without `prompts`.
        prompts: Of each sample the first tokens that are left out of the row, for their keys and
            values come from a `PromptCache`.
        num_image_tokens: Image tokens of each sample.
        sample_ids: B names, for messages.
    """

    input_ids: Tensor
    position_ids: Tensor
    to_padded: Tensor
    to_packed: Tensor
    image_rows: Tensor
    answer_rows: Tensor
    targets: Tensor
    prompt_places: Tensor
    lengths: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    num_image_tokens: tuple[int, ...]
    sample_ids: tuple[str, ...]

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Samples B and tokens of the longest one T, with its prompt."""
        whole = (len(p) + n for p, n in zip(self.prompts, self.lengths, strict=True))
        return len(self.lengths), max(whole)

    def pad(self, rows: Tensor, prompt_rows: Tensor | None = None) -> Tensor:
        """Lay packed rows (N, …) out as (B, T, …).

        What stands at padding, and at prompts without `prompt_rows`, is arbitrary. No gradient is
        taken from there, and there must be none.
        """
        padded = _Move.apply(rows, self.to_padded, self.to_packed, prompt_rows, self.prompt_places)
        return padded.unflatten(0, self.padded_shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """Take the tokens out of a padded view (B, T, …): (N, …)."""
        return _Take.apply(padded.flatten(0, 1), self.to_packed)


def pack(
    input_ids: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    image_token_id: int,
    device: torch.device | str = "cpu",
    sample_ids: Sequence[str] | None = None,
    split_prompts: bool = False,
) -> PackedRows:
    """Pack the samples of a micro-batch.

    Args:
        input_ids: B tensors (T_i,) of token ids, on the CPU.
        labels: B tensors (T_i,): the token id where a position belongs to an answer, -100
            elsewhere.
        image_token_id: Id of `<image_patch>`.
        device: Where the tensors of the result go, in one copy that is not waited for.
        sample_ids: Names of the samples; their indices when None.
        split_prompts: Leave out what precedes the first image and the first answer.

    Returns:
        The rows.

    Raises:
        ValueError: There is no sample, or a sample has no token or not as many labels.
    """
    if not input_ids:
        raise ValueError("a micro-batch of no sample cannot be packed")
    names = tuple(sample_ids or (f"row {index}" for index in range(len(input_ids))))
    for name, ids, label in zip(names, input_ids, labels, strict=True):
        if not len(ids) or len(ids) != len(label):
            raise ValueError(f"sample {name}: {len(ids)} tokens and {len(label)} labels")
    prompts: list[tuple[int, ...]] = [()] * len(input_ids)
    if split_prompts:
        cuts = [_prompt_length(*row, image_token_id) for row in zip(input_ids, labels, strict=True)]
        prompts = [tuple(ids[:cut].tolist()) for ids, cut in zip(input_ids, cuts, strict=True)]
        input_ids = [ids[cut:] for ids, cut in zip(input_ids, cuts, strict=True)]
        labels = [label[cut:] for label, cut in zip(labels, cuts, strict=True)]
    lengths = tuple(map(len, input_ids))
    lengths_B = torch.tensor(lengths)
    starts_B = torch.tensor(list(map(len, prompts)))
    ends_B = starts_B + lengths_B
    offsets_B = lengths_B.cumsum(0) - ends_B
    columns_T = torch.arange(int(ends_B.max()))
    is_prompt_BT = columns_T < starts_B[:, None]
    is_token_BT = (columns_T < ends_B[:, None]) & ~is_prompt_BT
    to_padded_BT = torch.where(is_token_BT, offsets_B[:, None] + columns_T, 0)
    ids_N = torch.cat(list(input_ids))
    # Position t predicts token t + 1; the last token of a sample predicts none.
    predicted_N = torch.cat([nn.functional.pad(x[1:], (0, 1), value=IGNORE_INDEX) for x in labels])
    answer_rows_A = (predicted_N != IGNORE_INDEX).nonzero().squeeze(1)
    is_image_N = ids_N == image_token_id
    parts = {
        "input_ids": ids_N,
        "position_ids": columns_T.expand_as(to_padded_BT)[is_token_BT],
        "to_padded": to_padded_BT.flatten(),
        "to_packed": is_token_BT.flatten().nonzero().squeeze(1),
        "image_rows": is_image_N.nonzero().squeeze(1),
        "answer_rows": answer_rows_A,
        "targets": predicted_N[answer_rows_A],
        "prompt_places": is_prompt_BT.flatten().nonzero().squeeze(1),
    }
    joined = torch.cat(list(parts.values()))
    if torch.device(device).type == "cuda":
        joined = joined.pin_memory()
    moved = joined.to(device, non_blocking=True).split([len(part) for part in parts.values()])
    return PackedRows(
        **dict(zip(parts, moved, strict=True)),
        lengths=lengths,
        prompts=tuple(prompts),
        num_image_tokens=tuple(int(part.sum()) for part in is_image_N.split(lengths)),
        sample_ids=names,
    )


def _prompt_length(input_ids: Tensor, labels: Tensor, image_token_id: int) -> int:
    """Tokens before the first image token and before the first row that predicts an answer."""
    is_image_T = input_ids == image_token_id
    predicts_T = nn.functional.pad(labels[1:] != IGNORE_INDEX, (0, 1))
    needed = (is_image_T | predicts_T).nonzero()
    return int(needed[0]) if len(needed) else 0


def num_answer_tokens(labels: Iterable[Any]) -> int:
    """Count the tokens of samples that take a loss, of tensors or arrays (T_i,) of labels."""
    return sum(int((x[1:] != IGNORE_INDEX).sum()) for x in labels)


class _Move(torch.autograd.Function):
    """Rows to the padded view. Each row stands there once, so that its gradient is gathered: the
    sum that `index_select` would make is slower and, on a GPU, of no fixed order."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        to_padded: Tensor,
        to_packed: Tensor,
        prompt_rows: Tensor | None,
        prompt_places: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(to_packed)
        padded = rows.index_select(0, to_padded)
        return padded if prompt_rows is None else padded.index_copy_(0, prompt_places, prompt_rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (to_packed,) = ctx.saved_tensors
        return gradient.index_select(0, to_packed), None, None, None, None


class _Take(torch.autograd.Function):
    """Some rows of many, none twice; the others take no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        spread = gradient.new_zeros(ctx.num_rows, *gradient.shape[1:])
        return spread.index_copy_(0, index, gradient), None


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return `rows[index]` of (N, …), where no index stands twice."""
    return _Take.apply(rows, index)
