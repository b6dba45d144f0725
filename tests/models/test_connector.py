"""The connector: the specification's shapes and counts, and its arithmetic against plain tensor
code."""

import math

import pytest
import torch
from torch import nn

from vlm_composer.models.connector import Connector
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def specified():
    with torch.device("meta"):
        resampler = PerceiverResampler(1152, num_latents=64, depth=2, num_heads=8, head_dim=64)
        return resampler, MLPProjector(512, 4096, mlp_ratio=4)


def test_the_specification_counts_hold_part_by_part():
    resampler, projector = specified()
    layer = resampler.layers[0]
    assert count(resampler.proj_in) == 590_336
    assert resampler.latents.numel() == 32_768
    assert count(layer.ln1) == count(layer.ln2) == 1_024
    assert count(layer.attn) == 1_050_624
    assert count(layer.ff) == 2_099_712
    assert [count(one) for one in resampler.layers] == [3_152_384] * 2
    assert count(resampler) == 6_927_872
    assert count(projector) == 75_517_952
    assert (projector.fc1.in_features, projector.fc1.out_features) == (512, 16384)
    assert (projector.fc2.in_features, projector.fc2.out_features) == (16384, 4096)
    assert count(Connector(resampler, projector)) == 82_445_824
    assert count(nn.LayerNorm(1152)) == 2_304


def test_the_specification_shapes_hold():
    with torch.device("meta"):
        connector = Connector(*specified(), nn.LayerNorm(1152))
        patches = torch.empty(3, 729, 1152)
    assert connector.resampler(patches).shape == (3, 64, 512)
    assert connector(patches).shape == (3, 64, 4096)
    assert connector.num_image_tokens == 64


def reference(connector: Connector, patches: torch.Tensor) -> torch.Tensor:
    """The same connector, written with matrix products alone."""

    def norm(x, ln):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + ln.eps) * ln.weight + ln.bias

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    if connector.vision_ln is not None:
        patches = norm(patches, connector.vision_ln)
    resampler = connector.resampler
    kv = patches @ resampler.proj_in.weight.T + resampler.proj_in.bias
    rows = []
    for one in kv:
        latents = resampler.latents
        for layer in resampler.layers:
            attn = layer.attn
            wq, wk, wv = attn.in_proj_weight.chunk(3)
            bq, bk, bv = attn.in_proj_bias.chunk(3)
            query, key, value = (
                norm(latents, layer.ln1) @ wq.T + bq,
                one @ wk.T + bk,
                one @ wv.T + bv,
            )
            head_dim = query.shape[1] // attn.num_heads
            heads = []
            for h in range(attn.num_heads):
                part = slice(h * head_dim, (h + 1) * head_dim)
                scores = query[:, part] @ key[:, part].T / math.sqrt(head_dim)
                heads.append(scores.softmax(-1) @ value[:, part])
            latents = latents + torch.cat(heads, 1) @ attn.out_proj.weight.T + attn.out_proj.bias
            hidden = gelu(norm(latents, layer.ln2) @ layer.ff[0].weight.T + layer.ff[0].bias)
            latents = latents + hidden @ layer.ff[2].weight.T + layer.ff[2].bias
        rows.append(latents)
    projector = connector.projector
    hidden = gelu(torch.stack(rows) @ projector.fc1.weight.T + projector.fc1.bias)
    return hidden @ projector.fc2.weight.T + projector.fc2.bias


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("num_patches", [1, 9])
def test_outputs_and_gradients_equal_plain_tensor_code(with_norm, num_patches):
    connector = Connector(
        PerceiverResampler(24, num_latents=5, depth=2, num_heads=4, head_dim=8),
        MLPProjector(32, 20, mlp_ratio=3),
        nn.LayerNorm(24) if with_norm else None,
    ).double()
    with torch.no_grad():  # biases start at zero, where a forgotten one would not show
        for parameter in connector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    patches = torch.randn(3, num_patches, 24, dtype=torch.float64)
    weigh = torch.randn(3, 5, 20, dtype=torch.float64)
    parameters = list(connector.parameters())
    ours, expected = connector(patches), reference(connector, patches)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(
        torch.autograd.grad((ours * weigh).sum(), parameters),
        torch.autograd.grad((expected * weigh).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_patches_in_bf16_are_read_in_fp32():
    connector = Connector(
        PerceiverResampler(24, num_latents=5, depth=2, num_heads=4, head_dim=8),
        MLPProjector(32, 20, mlp_ratio=4),
    )
    assert connector(torch.randn(1, 9, 24, dtype=torch.bfloat16)).dtype == torch.float32
