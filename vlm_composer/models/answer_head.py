"""The language model's head and the loss in one, over answer tokens alone.

Shape suffixes: A answer tokens, D width, R rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlm_composer.models.replacing import StandInLinear

ROWS_A_CHUNK = 256
"""Rows whose logits exist at a time: 155 MB in fp32 at a vocabulary of 151,936."""


class AnswerHead(StandInLinear):
    """A frozen head that returns logits, or, where it is given targets, their loss.

    It takes the place of a model's own head under the same name and with the same weights. The loss
    is computed in its `forward`, where FSDP2 gathers the weights.

    Args:
        linear: The model's own head.
    """

    def forward(
        self, input: Tensor, targets_A: Tensor | None = None, *, each: bool = False
    ) -> Tensor:
        """Return logits, or a loss.

        Args:
            input: Hidden states (…, D); (A, D) with targets.
            targets_A: Token ids.
            each: Return the loss of each row, which has no gradient, in place of their sum.

        Returns:
            Logits (…, vocabulary) in the dtype of the weights, or, with targets, the sum of the
            cross-entropies in fp32 (fp64 where the input is); 0 for no row. With `each` (A,).
        """
        if targets_A is None:
            return super().forward(input)
        if each:
            return self._losses(input, targets_A)
        return _SummedCrossEntropy.apply(input, targets_A, self.weight, self.bias)

    @torch.no_grad()
    def _losses(self, hidden_AD: Tensor, targets_A: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_AD.dtype, torch.float32)
        losses = [
            nn.functional.cross_entropy(
                nn.functional.linear(hidden, self.weight, self.bias).to(dtype),
                targets,
                reduction="none",
            )
            for hidden, targets in zip(
                hidden_AD.split(ROWS_A_CHUNK), targets_A.split(ROWS_A_CHUNK), strict=True
            )
        ]
        return torch.cat(losses)


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of a linear layer's outputs, a chunk of rows at a time.

    The layer is frozen, so that the gradient of its input is all there is to keep: it is computed
    in the forward, while a chunk's logits are there, and no logits outlive their chunk. After Liger
    Kernel's fused linear cross-entropy (Hsu et al., 2024).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_AD: Tensor, targets_A: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        dtype = torch.promote_types(hidden_AD.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=hidden_AD.device)
        gradient_AD = torch.empty_like(hidden_AD) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden_AD.shape[0], ROWS_A_CHUNK):
            rows = slice(start, start + ROWS_A_CHUNK)
            targets_R1 = targets_A[rows, None]
            logits = nn.functional.linear(hidden_AD[rows], weight, bias).to(total.dtype)
            # In place, and each exponential once: `logsumexp` would make another such tensor.
            logits -= logits.amax(dim=1, keepdim=True)
            at_targets_R1 = logits.gather(1, targets_R1)
            sums_R1 = logits.exp_().sum(dim=1, keepdim=True)
            total += (sums_R1.log() - at_targets_R1).sum()
            if gradient_AD is not None:
                error = logits.div_(sums_R1)  # the probabilities, less 1 at the target
                error[torch.arange(len(error), device=error.device), targets_R1[:, 0]] -= 1
                gradient_AD[rows] = error.to(weight.dtype) @ weight
        ctx.gradient_AD = gradient_AD
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        scaled_AD = ctx.gradient_AD.to(gradient.dtype) * gradient
        return scaled_AD.to(ctx.gradient_AD.dtype), None, None, None
