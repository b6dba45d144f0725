"""Guards end a run that trains the wrong thing or nothing, or whose loss is not finite."""

import pytest
import torch

from runs import start
from vlm_composer.training.guards import NonFiniteLossError, TrainabilityError


def test_a_frozen_weight_with_a_gradient_ends_the_run(tiny_config):
    trainer, vlm, _ = start(tiny_config())
    weight = next(vlm.language_model.parameters())
    weight.grad = torch.ones_like(weight)  # not the optimizer's, which zeroes only its own
    with pytest.raises(
        TrainabilityError, match=r"1 frozen parameter\(s\) got a gradient.*language_model"
    ):
        trainer.fit()


def test_a_trained_weight_without_a_gradient_ends_the_run(tiny_config):
    trainer, vlm, _ = start(tiny_config())
    vlm.connector.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(TrainabilityError, match=r"1 of \d+ trained parameters .*connector\.unused"):
        trainer.fit()


def test_gradients_that_are_all_zero_end_the_run(tiny_config):
    trainer, vlm, _ = start(tiny_config())
    original = vlm.connector.forward
    vlm.connector.forward = lambda patches: original(patches) * 0
    with pytest.raises(TrainabilityError, match="every gradient of the first step is zero"):
        trainer.fit()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_batch_and_samples(tiny_config, value):
    trainer, vlm, watch = start(tiny_config())
    with torch.no_grad():
        vlm.connector.projector.fc2.bias.fill_(value)
    with pytest.raises(
        NonFiniteLossError, match=r"batch 0: the loss is nan for samples s\d+, s\d+"
    ):
        trainer.fit()
    assert not watch.gradients


def test_without_the_guard_the_run_goes_on(tiny_config):
    trainer, vlm, watch = start(tiny_config(callbacks={"nan_guard": None}, max_duration="1ba"))
    assert vlm.connector is not None
    trainer.fit()
    assert len(watch.losses) == 1
