"""Each warning comes where its fault is provoked in a real run, once, with what to do."""

import json
import logging
from dataclasses import asdict

import pytest
import torch
from composer.core import Callback

from runs import metrics_of, start
from vlm_composer.config.reports import LiveWarningsConfig
from vlm_composer.evaluation.warnings import LiveWarnings

EVIDENCE = {"num_samples": 5, "num_choices": 2}
QUICK = {"window": 4, "cooldown": 100}


def warned(folder):
    path = folder / "run" / "warnings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def provoke(tiny_config, tmp_path, caplog):
    """Runs with a fault: `change(trainer, vlm)` may make one; returns what was warned of."""

    def fit(change=None, *, warnings=None, **changes):
        settings = {"max_duration": "6ba", "eval_interval": "3ba", **changes}
        settings["callbacks"] = {
            "evidence": EVIDENCE,
            "nan_guard": None,
            "warnings": QUICK | (warnings or {}),
        }
        trainer, vlm, _ = start(tiny_config(**settings))
        if change is not None:
            change(trainer, vlm)
        with caplog.at_level(logging.WARNING, logger="vlm_composer"):
            trainer.fit()
        trainer.close()
        found = warned(tmp_path)
        lines = [record.getMessage() for record in caplog.records]
        for warning in found:
            assert any(warning["message"] in line for line in lines)
            assert len(metrics_of(trainer)[f"warnings/{warning['name']}"]) == len(
                [x for x in found if x["name"] == warning["name"]]
            )
        return found

    return fit


def only(found, name):
    return [warning for warning in found if warning["name"] == name]


class At(Callback):
    """Does something at an event of Composer's."""

    def __init__(self, event, action):
        setattr(self, event, lambda state, logger: action(state))


def test_a_loss_spike(provoke):
    def change(trainer, vlm):
        def multiply(state):
            if state.timestamp.batch == 3:
                state.outputs = state.outputs._replace(total=10 * state.outputs.total)

        trainer.state.callbacks.append(At("after_forward", multiply))

    (warning,) = only(provoke(change), "loss_spike")
    assert warning["batch"] == 3
    assert "lower optimizer.lr" in warning["message"]


def scale_gradients(factor, first_batch, last_batch=1000):
    """Multiply the gradients of a batch's last micro-batch and of all before, in some batches."""

    def change(trainer, vlm):
        def scale(state):
            if first_batch <= state.timestamp.batch.value <= last_batch:
                for parameter in vlm.connector.parameters():
                    parameter.grad.mul_(factor)

        trainer.state.callbacks.append(At("after_backward", scale))

    return change


def test_gradients_that_explode_though_they_are_clipped(provoke):
    clipping = {"gradient_clipping": {"clipping_threshold": 1e-3}}
    found = provoke(scale_gradients(100, 3), algorithms=clipping, warnings={"window": 6})
    (warning,) = only(found, "gradient_exploding")
    assert warning["batch"] == 6  # batches done by then, three of which exploded
    assert "before clipping" in warning["message"]
    assert "3 times in 6 batches" in warning["message"]


def test_one_unusual_gradient_is_no_explosion(tmp_path):
    """As in the demo: 28.7 at a median of 2.75, once, and again when it is forgotten."""
    found = LiveWarnings(tmp_path / "warnings.jsonl", **asdict(LiveWarningsConfig(window=8)))
    said = []
    found._warn = lambda name, message: said.append(name)
    quiet = [2.75, 2.4, 2.7, 2.2, 2.8, 2.6, 2.5]
    for norm in (*quiet, 28.7, *quiet, 28.7, 28.7):
        found.log_metrics({"gradients/norm": norm})
    assert said == []
    found.log_metrics({"gradients/norm": 28.7})
    assert said == ["gradient_exploding"]


def test_gradients_of_zero(provoke):
    (warning,) = only(provoke(scale_gradients(0, 2)), "gradient_zero")
    assert warning["batch"] == 3
    assert "whether the samples have answers" in warning["message"]


def test_a_connector_that_collapsed(provoke):
    def change(trainer, vlm):
        def zero(state):
            vlm.connector.projector.fc2.weight.data.zero_()

        trainer.state.callbacks.append(At("eval_start", zero))

    found = provoke(change)
    (warning,) = only(found, "connector_collapsed")
    assert warning["batch"] == 3
    assert "connector.vision_ln: true" in warning["message"]
    assert not only(found, "dead_latents")


def test_dead_latents(provoke):
    def change(trainer, vlm):
        def same_for_all(module, given, tokens):
            return torch.cat([torch.ones_like(tokens[:, :2]), tokens[:, 2:]], dim=1)

        vlm.connector.register_forward_hook(same_for_all)

    (warning,) = only(provoke(change, warnings={"gap_after": 0.9}), "dead_latents")
    assert warning["batch"] == 6
    assert warning["message"].startswith("50% of the latents")
    assert "connector.resampler.num_latents" in warning["message"]


def test_a_gap_that_does_not_open(provoke):
    found = provoke(optimizer={"lr": 1e-9}, warnings={"gap_after": 0.5})
    (warning,) = only(found, "gap_not_opening")
    assert warning["batch"] == 3
    assert warning["message"].startswith("after 50% of the run the right image is worth ")
    assert "lower optimizer.lr where evidence/output_norm_ratio" in warning["message"]


def test_a_gap_has_its_time(provoke):
    found = provoke(optimizer={"lr": 1e-9}, warnings={"gap_after": 0.6})
    assert [warning["batch"] for warning in only(found, "gap_not_opening")] == [6]


def test_what_goes_on_is_said_again_after_the_cool_down(provoke):
    found = provoke(scale_gradients(0, 1), warnings={"cooldown": 2})
    assert [warning["batch"] for warning in only(found, "gradient_zero")] == [2, 4, 6]


def test_a_resumed_run_warns_as_an_uninterrupted_one(tiny_config, tmp_path):
    """Its medians, cool-downs and file go on where the checkpoint was saved."""

    def config(name):
        often = {"window": 6, "gradient_factor": 1.5, "cooldown": 2}
        return tiny_config(
            max_duration="10ba",
            run_folder=str(tmp_path / name / "run"),
            save_folder=str(tmp_path / name / "saved"),
            save_interval="5ba",
            autoresume=True,
            callbacks={"warnings": often, "evidence": None},
        )

    def crash(state):
        if state.timestamp.batch == 8:
            raise KeyboardInterrupt

    def begin(name):
        trainer, vlm, _ = start(config(name))
        for batch in (3, 4, 6, 9):  # two before the checkpoint, and a third
            scale_gradients(100, batch, batch)(trainer, vlm)
        return trainer

    trainer = begin("whole")
    trainer.fit()
    trainer.close()
    trainer = begin("parts")
    trainer.state.callbacks.append(At("batch_end", crash))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.close()
    assert [warning["batch"] for warning in warned(tmp_path / "parts")] == [7]  # it comes again
    trainer = begin("parts")
    assert trainer.state.timestamp.batch == 5
    trainer.fit()
    trainer.close()
    assert [warning["batch"] for warning in warned(tmp_path / "parts")] == [7, 10]
    assert warned(tmp_path / "parts") == warned(tmp_path / "whole")


def test_losses_that_vary_are_no_spikes(tmp_path):
    """A loss is judged by its median and by how far the others lie from it."""
    found = LiveWarnings(tmp_path / "warnings.jsonl", **asdict(LiveWarningsConfig(window=8)))
    said = []
    found._warn = lambda name, message: said.append(name)
    for loss in (1.0, 3.0, 0.4, 2.6, 0.5, 3.1, 0.9, 2.2, 3.3):
        found.log_metrics({"loss/train/total": loss})
    assert said == []
    found.log_metrics({"loss/train/total": 30.0})
    assert said == ["loss_spike"]


def test_without_the_callback_nothing_is_looked_at(tiny_config, tmp_path):
    trainer, _, _ = start(tiny_config(callbacks={"warnings": None}, optimizer={"lr": 1e3}))
    trainer.fit()
    trainer.close()
    assert "gradients/norm" not in metrics_of(trainer)
    assert not warned(tmp_path)
