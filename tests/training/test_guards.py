"""Guards end a run that trains the wrong thing or nothing, or whose loss is not finite."""

import pytest
import torch
from composer.core import Callback

from runs import start
from vlm_composer.training.guards import NonFiniteLossError, ShortEpochError, TrainabilityError


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


class Disturb(Callback):
    """Changes something in the first batch."""

    def __init__(self, change):
        self.change = change

    def batch_start(self, state, logger):
        if state.timestamp.batch == 0:
            self.change()


def test_a_frozen_weight_that_changed_ends_the_run(tiny_config):
    trainer, vlm, _ = start(tiny_config())
    weight = next(vlm.vision_tower.parameters())

    def nudge():
        weight.view(torch.int32).view(-1)[0] ^= 1  # one bit

    trainer.state.callbacks.append(Disturb(nudge))
    with pytest.raises(
        TrainabilityError, match=r"vision_tower is frozen, yet .* hash was \w{32} .* is \w{32} now"
    ):
        trainer.fit()


def test_an_epoch_that_ends_early_ends_the_run(tiny_config):
    trainer, _, watch = start(tiny_config(max_duration="2ep"))
    dataset = trainer.state.train_dataloader.dataset

    def lose_the_rest():  # as a stock StreamingDataset does when its store goes away
        dataset._event.set()

    trainer.state.callbacks.append(Disturb(lose_the_rest))
    with pytest.raises(ShortEpochError, match=r"epoch 0 ended after \d of 5 batches"):
        trainer.fit()
    assert len(watch.losses) < 5
