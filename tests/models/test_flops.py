"""The operations that MFU is made of, against torch's own counter on the real architectures."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tiny import IMAGE, K, batch_of, packed, tiny_dinov2, tiny_llama, tiny_qwen3, tiny_siglip
from vlm_composer.assembly import assemble_model, unloaded
from vlm_composer.config import TrainConfig
from vlm_composer.models.connector import Connector
from vlm_composer.models.fake_tensors import fake_weights
from vlm_composer.models.flops import training_flops
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.packed_attention import attention_kernel, fused_attention
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.planning.activations import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    fake_batch,
    sample_batch,
)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("vision", "llm", "size"),
    [(tiny_siglip, tiny_qwen3, 32), (tiny_dinov2, tiny_llama, 42)],
    ids=["siglip-qwen3", "dinov2-llama"],
)
def test_the_count_equals_what_torch_counts(vision, llm, size, with_norm):
    tower = VisionTower(vision())
    resampler = PerceiverResampler(48, num_latents=K, depth=2, num_heads=2, head_dim=16)
    norm = nn.LayerNorm(48) if with_norm else None
    connector = Connector(resampler, MLPProjector(32, 64, mlp_ratio=2), norm)
    model = VisionLanguageModel(tower, connector, LanguageModel(llm()), IMAGE)
    rows = [(2, 1, 5), (2, 1, 5)]  # of one length, for padding is counted by torch and not by us
    pixels, ids, labels = batch_of(rows, size)
    # The math backend makes attention of plain products, whose backward recomputes nothing.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(pixels, packed(ids, labels)).total.backward()
    num_tokens, num_answer_tokens = 2 * (2 + K + 1 + 5), 2 * 5
    ours = training_flops(model, [num_tokens // 2] * 2, num_answer_tokens)
    last_layer = model.language_model.model.model.layers[-1]
    last_feed_forward = sum(p.numel() for p in last_layer.mlp.parameters())
    not_computed = 4 * last_feed_forward * (num_tokens - num_answer_tokens)
    assert ours.total - not_computed == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_parts_scale_as_they_should():
    model = VisionLanguageModel(
        VisionTower(tiny_siglip()),
        Connector(
            PerceiverResampler(48, num_latents=K, depth=2, num_heads=2, head_dim=16),
            MLPProjector(32, 64, mlp_ratio=4),
        ),
        LanguageModel(tiny_qwen3()),
        IMAGE,
    )
    one, two = training_flops(model, [10], 3), training_flops(model, [10, 10], 6)
    assert two.total == 2 * one.total
    longer = training_flops(model, [20], 3)
    assert longer.vision_tower == one.vision_tower
    assert longer.head == one.head
    assert longer.decoder > 2 * one.decoder


def test_the_full_size_model_costs_what_the_arithmetic_says():
    from vlm_composer.models.tower_loading import load_language_model, load_vision_model

    with torch.device("meta"):
        vision = load_vision_model(
            "google/siglip2-so400m-patch14-384", pretrained=False, dtype=torch.bfloat16
        )
        llm = load_language_model("Qwen/Qwen3-8B-Base", pretrained=False, dtype=torch.bfloat16)
        model = VisionLanguageModel(
            VisionTower(vision),
            Connector(
                PerceiverResampler(1152, num_latents=64, depth=2, num_heads=8, head_dim=64),
                MLPProjector(512, 4096, mlp_ratio=4),
            ),
            LanguageModel(llm),
            151_935,
        )
    flops = training_flops(model, [97], 24)
    assert flops.vision_tower / 1e12 == pytest.approx(0.67, abs=0.01)
    assert flops.decoder / 1e12 == pytest.approx(2.70, abs=0.02)
    assert flops.head / 1e12 == pytest.approx(0.06, abs=0.005)
    assert flops.connector / 1e12 == pytest.approx(0.04, abs=0.01)


def test_the_full_size_model_costs_what_torch_counts():
    """On fake tensors of the real sizes: two samples of the recipe, forward and backward."""
    config = TrainConfig.read(Path(__file__).parents[2] / "yamls" / "stage1.yaml")
    with torch.device("meta"):
        model = assemble_model(unloaded(config), "gpu")
    samples, prompt, answer = 2, PROMPT_TOKENS, ANSWER_TOKENS
    tokens = prompt + model.connector.num_image_tokens + answer
    ours = training_flops(model, [tokens] * samples, samples * answer)
    batch = sample_batch(model, samples, prompt, answer)
    feed_forward = model.language_model.model.model.layers[-1].mlp
    not_computed = 4 * sum(p.numel() for p in feed_forward.parameters()) * (tokens - answer)
    mode = FakeTensorMode()
    fake_weights(model, mode)
    images, rows = fake_batch(mode, *batch)
    with mode, FlopCounterMode(display=False) as counter, attention_kernel(fused_attention):
        model(images, rows).total.backward()
    counted = counter.get_total_flops()
    assert ours.total - samples * not_computed == pytest.approx(counted, rel=0.02)
