"""What is measured on fake tensors, against runs that allocate."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from tiny import IMAGE, K, tiny_qwen3, tiny_siglip
from vlm_composer.models.connector import Connector
from vlm_composer.models.fake_tensors import fake_weights
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.packed_attention import attention_kernel, fused_attention
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.models.vlm import VisionLanguageModel
from vlm_composer.planning.activations import (
    LiveBytes,
    fake_batch,
    measure_activations,
    measure_step,
    sample_batch,
)

SAMPLES, PROMPT, ANSWER = 4, 9, 24


def tiny_model(**changes):
    return VisionLanguageModel(
        VisionTower(tiny_siglip()),
        Connector(
            PerceiverResampler(48, num_latents=K, depth=2, num_heads=2, head_dim=16),
            MLPProjector(32, 64, mlp_ratio=2),
        ),
        LanguageModel(tiny_qwen3(**changes)),
        IMAGE,
    )


def allocator_bytes(run):
    """Peak and last of what torch's CPU allocator hands out while `run` runs, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    del kept
    return peak, now


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_fake_tensors_hold_what_real_ones_hold(autocast_dtype):
    model = tiny_model()
    batch = sample_batch(model, SAMPLES, PROMPT, ANSWER)
    real = measure_step(model, *batch, autocast_dtype)
    mode = FakeTensorMode()
    fake_weights(model, mode)
    batch = fake_batch(mode, *batch)
    with mode:
        fake = measure_step(model, *batch, autocast_dtype)
    assert fake.kept == pytest.approx(real.kept, rel=0.02)
    assert fake.peak == pytest.approx(real.peak, rel=0.02)


def test_what_is_counted_is_what_the_allocator_hands_out():
    model = tiny_model()
    images, rows = sample_batch(model, SAMPLES, PROMPT, ANSWER)
    counted = measure_step(model, images, rows)

    def forward():
        return images.clone(), model(images, rows)

    forward()  # what is made once
    _, kept = allocator_bytes(forward)
    peak, _ = allocator_bytes(lambda: model(images, rows).total.backward())
    assert counted.kept == pytest.approx(kept, rel=0.03)
    assert counted.peak == pytest.approx(peak + images.nbytes, rel=0.05)


def test_flash_attention_is_counted_as_a_fused_kernel_that_runs():
    heads = {"num_key_value_heads": 4}  # without groups the CPU has a fused kernel too
    model = tiny_model(**heads)
    images, rows = sample_batch(model, SAMPLES, PROMPT, ANSWER)
    with attention_kernel(fused_attention):
        real = measure_step(model, images, rows)
    with torch.device("meta"):
        model = tiny_model(**heads)
    fake = measure_activations(
        model,
        microbatch_size=SAMPLES,
        prompt_tokens=PROMPT,
        answer_tokens=ANSWER,
        autocast_dtype=None,
    )
    assert fake.kept == pytest.approx(real.kept, rel=0.03)
    assert fake.peak == pytest.approx(real.peak, rel=0.03)


def test_live_bytes_follow_a_storage_from_its_making_to_its_end():
    with LiveBytes() as live:
        one = torch.zeros(1000)
        view = one.view(10, 100)
        del one
        assert live.now == 4000
        two = view.add(1)
        assert live.now == 8000
        view.add_(two)
        del view
        assert live.now == 4000
    assert live.peak == 8000
