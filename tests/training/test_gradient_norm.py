"""The norm that is logged is that of the whole gradient, before it is clipped."""

import pytest

from runs import metrics_of, run

CLIPPED = {"gradient_clipping": {"clipping_threshold": 1e-3}}


def norm(gradients):
    return sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5


def check(tiny_config, **changes):
    norms = []
    for algorithms in ({}, CLIPPED):
        trainer, _, watch = run(tiny_config(max_duration="1ba", algorithms=algorithms, **changes))
        norms.append((metrics_of(trainer)["gradients/norm"][0][1], norm(watch.gradients[0])))
    (logged, free), (before, clipped) = norms
    assert logged == pytest.approx(free, rel=1e-5)
    assert before == pytest.approx(free, rel=1e-5)
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_the_norm_before_clipping(tiny_config):
    check(tiny_config)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("parallelism", ["replicate", "shard"])
def test_the_norm_over_two_ranks(tiny_config, parallelism):
    check(tiny_config, parallelism=parallelism, device_train_microbatch_size=2)
