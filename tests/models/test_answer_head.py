"""The loss in chunks is cross-entropy, in value, gradient and memory."""

import pytest
import torch
from torch import nn

from vlm_composer.models import answer_head
from vlm_composer.models.answer_head import AnswerHead

CASES = [(1, 7), (2, 8), (3, 9), (0, 9), (8, 8), (64, 8), (5, 1)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("chunk", "rows"), CASES)
def test_loss_and_gradient_are_those_of_cross_entropy(chunk, rows, bias, monkeypatch):
    monkeypatch.setattr(answer_head, "ROWS_A_CHUNK", max(chunk, 1))
    rows = rows if chunk else 0
    linear = nn.Linear(16, 50, bias=bias).requires_grad_(False)
    hidden = torch.randn(rows, 16, requires_grad=True)
    targets = torch.randint(0, 50, (rows,))
    ours = AnswerHead(linear)(hidden, targets)
    expected = nn.functional.cross_entropy(linear(hidden), targets, reduction="sum")
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * ours, hidden)[0], torch.autograd.grad(3 * expected, hidden)[0]
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("chunk", "rows"), CASES)
def test_the_loss_of_each_row(chunk, rows, bias, monkeypatch):
    monkeypatch.setattr(answer_head, "ROWS_A_CHUNK", max(chunk, 1))
    linear = nn.Linear(16, 50, bias=bias).requires_grad_(False)
    hidden, targets = torch.randn(rows if chunk else 0, 16), torch.randint(0, 50, (rows,))
    targets = targets[: len(hidden)]
    expected = nn.functional.cross_entropy(linear(hidden), targets, reduction="none")
    torch.testing.assert_close(AnswerHead(linear)(hidden, targets, each=True), expected)


def test_bf16_is_no_further_from_fp32_than_torch_in_bf16():
    linear = nn.Linear(64, 400, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(30, 64), torch.randint(0, 400, (30,))

    def gradient(head, dtype, fused):
        x = hidden.to(dtype).requires_grad_()
        head = AnswerHead(head.to(dtype))
        if fused:
            loss = head(x, targets) / 30
        else:
            loss = nn.functional.cross_entropy(head(x).float(), targets)
        return torch.autograd.grad(loss, x)[0].float()

    exact = gradient(linear, torch.float32, fused=False)
    ours = (gradient(linear, torch.bfloat16, fused=True) - exact).norm()
    theirs = (gradient(linear, torch.bfloat16, fused=False) - exact).norm()
    assert ours <= 1.2 * theirs


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch):
    monkeypatch.setattr(answer_head, "ROWS_A_CHUNK", 4)
    head = AnswerHead(nn.Linear(2, 1000, bias=False).requires_grad_(False))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 1000:
                sizes.append(out.shape[0])
            return out

    with Watch():
        head(torch.randn(64, 2, requires_grad=True), torch.randint(0, 1000, (64,))).backward()
    assert max(sizes) == 4


def test_a_head_keeps_the_parameters_of_the_linear_it_replaces():
    linear = nn.Linear(8, 20)
    head = AnswerHead(linear)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    torch.testing.assert_close(head(torch.ones(2, 3, 8)), linear(torch.ones(2, 3, 8)))
