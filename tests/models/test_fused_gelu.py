"""oneDNN's linear with GELU is that of torch, and follows its weight."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from tiny import tiny_dinov2, tiny_siglip
from vlm_composer.models.fused_gelu import GELULinear, fuse_gelu
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.training.hardware import fusing_obstacle


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 16, 48)])
def test_it_computes_what_torch_computes(shape, approximate):
    linear, x = nn.Linear(48, 96), torch.randn(shape)
    fused = GELULinear(linear, approximate)
    with torch.inference_mode():
        expected = nn.functional.gelu(linear(x), approximate=approximate)
        torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_knows_what_this_cpu_can_do(dtype):
    fused = GELULinear(nn.Linear(48, 96).to(dtype), "tanh")
    obstacle = fusing_obstacle("cpu", dtype)
    with pytest.raises(RuntimeError) if obstacle else contextlib.nullcontext():
        fused(torch.randn(7, 48).to(dtype))


@pytest.mark.skipif(
    fusing_obstacle("cpu", torch.bfloat16) is not None, reason="oneDNN takes no bf16 on this CPU"
)
def test_bf16_is_no_further_from_fp32_than_torch_in_bf16():
    linear, x = nn.Linear(48, 96), torch.randn(200, 48)
    rounded = copy.deepcopy(linear).bfloat16()
    with torch.inference_mode():
        expected = nn.functional.gelu(linear(x), approximate="tanh")
        ours = GELULinear(rounded, "tanh")(x.bfloat16()).float()
        theirs = nn.functional.gelu(rounded(x.bfloat16()), approximate="tanh").float()
    assert (ours - expected).norm() <= 1.2 * (theirs - expected).norm()


def test_a_tower_gives_the_same_patches():
    tower = VisionTower(tiny_siglip())
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before, names = tower(pixels), list(tower.state_dict())
    assert fuse_gelu(tower.model) == 3
    assert list(tower.state_dict()) == names
    torch.testing.assert_close(tower(pixels), before, rtol=1e-4, atol=1e-5)


def test_other_feed_forwards_stay():
    assert fuse_gelu(tiny_dinov2()) == 0
    assert fuse_gelu(tiny_siglip(hidden_act="relu")) == 0


def test_weights_that_are_loaded_later_are_used():
    tower, other = VisionTower(tiny_siglip()), VisionTower(tiny_siglip())
    fuse_gelu(tower.model)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    tower(pixels)
    tower.load_state_dict(other.state_dict())
    torch.testing.assert_close(tower(pixels), other(pixels), rtol=1e-4, atol=1e-5)
