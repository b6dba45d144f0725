"""The parts of a step add up to it, and each takes the time of what is slow in it, no other's."""

import logging

import pytest
import torch
from composer.core import Callback
from torch.utils.checkpoint import checkpoint

from runs import last, metrics_of, start
from vlm_composer.training.step_parts import PARTS
from vlm_composer.training.step_times import HostClock, StepTimes

TIMES = {"step_times": {"warmup_batches": 1, "interval": "1ep"}}
STEPS = 3
"""That are averaged over."""


class VirtualClock:
    """A clock that stands still but for `Work`: what is timed is exact on any machine."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def is_past(self, mark):
        return True

    def wait_for(self, mark):
        pass

    def seconds(self, start, end):
        return end - start


class Work:
    """Takes a number of the clock's seconds, and knows how many it took in all."""

    def __init__(self, clock, seconds=1.0):
        self.clock, self.length, self.done = clock, seconds, 0.0

    def __call__(self, *_):
        self.clock.now += self.length
        self.done += self.length

    def before(self, function):
        """The same function with work before it."""

        def slow(*arguments, **options):
            self()
            return function(*arguments, **options)

        return slow


class RememberingClock(HostClock):
    """The host's clock, which keeps its marks."""

    def __init__(self):
        self.marks = []

    def mark(self):
        self.marks.append(super().mark())
        return self.marks[-1]


class Stopwatch(Callback):
    """Times steps by the first and the last mark of each."""

    def __init__(self, clock):
        self.clock, self.steps = clock, []

    def before_dataloader(self, state, logger):
        self.start = self.clock.marks[-1]

    def batch_end(self, state, logger):
        self.steps.append(self.clock.marks[-1] - self.start)


def fit(config, change=lambda trainer, vlm: None, clock=None):
    """Train with a change and a clock; returns the trainer and a stopwatch."""
    trainer, vlm, _ = start(config)
    clock = clock or RememberingClock()
    next(c for c in trainer.state.callbacks if isinstance(c, StepTimes)).clock = clock
    stopwatch = Stopwatch(clock)
    if isinstance(clock, RememberingClock):
        trainer.state.callbacks.append(stopwatch)
    change(trainer, vlm)
    trainer.fit()
    trainer.close()
    return trainer, stopwatch


def parts_of(trainer):
    return {part: last(trainer, f"time/{part}") for part in PARTS}


@pytest.fixture
def config(tiny_config):
    return lambda **changes: tiny_config(
        **{"max_duration": f"{STEPS + 1}ba", "eval_interval": "1ep", "callbacks": TIMES} | changes
    )


def test_the_parts_add_up_to_the_step(config, caplog):
    with caplog.at_level(logging.INFO, logger="vlm_composer"):
        trainer, stopwatch = fit(config())
    step = sum(stopwatch.steps[1:]) / STEPS
    parts = parts_of(trainer)
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(step)
    share = last(trainer, "time/data_wait_share")
    assert share == pytest.approx(parts["data_wait"] / sum(parts.values()))
    line = next(x.getMessage() for x in caplog.records if "A step takes" in x.getMessage())
    assert f"(average of {STEPS}): waiting for data {share:.1%}, vision tower" in line


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, work):
        ctx.work = work
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        ctx.work()
        return gradient, None


def slow_data(trainer, vlm, work):
    encoder = trainer.state.train_dataloader.collate_fn
    encoder.images = work.before(encoder.images)


def slow_vision(trainer, vlm, work):
    vlm.vision_tower.model.forward = work.before(vlm.vision_tower.model.forward)


def slow_connector(trainer, vlm, work):
    vlm.connector.projector.forward = work.before(vlm.connector.projector.forward)


def slow_decoder(trainer, vlm, work):
    layer = vlm.language_model.model.base_model.layers[1]
    layer.forward = work.before(layer.forward)


def slow_head(trainer, vlm, work):
    head = vlm.language_model.model.get_output_embeddings()
    head.forward = work.before(head.forward)


def slow_loss(trainer, vlm, work):
    trainer.state.model.loss = work.before(trainer.state.model.loss)


def slow_backward(trainer, vlm, work):
    vlm.connector.register_forward_hook(lambda *a: InBackward.apply(a[-1], work))


def slow_optimizer(trainer, vlm, work):
    # Not its `step` or a hook before it: Composer hands it the whole batch as a closure.
    optimizer = trainer.state.optimizers[0]
    optimizer._init_group = work.before(optimizer._init_group)


def slow_embedding(trainer, vlm, work):
    table = vlm.language_model.model.get_input_embeddings()
    table.forward = work.before(table.forward)


class SlowLog(Callback):
    def __init__(self, work):
        self.batch_start = work


def slow_callback(trainer, vlm, work):
    trainer.state.callbacks.append(SlowLog(work))


class Reset(Callback):
    """Notes the work that was done by the end of the warm-up."""

    def __init__(self, work, warm):
        self.work, self.warm = work, warm

    def batch_end(self, state, logger):
        if not self.warm:
            self.warm.append(self.work.done)


@pytest.mark.parametrize(
    ("part", "make_slow"),
    [
        ("data_wait", slow_data),
        ("vision", slow_vision),
        ("connector", slow_connector),
        ("llm_forward", slow_decoder),
        ("head_and_loss", slow_head),
        ("head_and_loss", slow_loss),
        ("backward", slow_backward),
        ("optimizer", slow_optimizer),
        ("other", slow_embedding),
        ("other", slow_callback),
    ],
)
def test_a_slow_part_shows_in_its_own_figure_alone(config, part, make_slow):
    clock = VirtualClock()
    work, warm = Work(clock), []

    def change(trainer, vlm):
        make_slow(trainer, vlm, work)
        trainer.state.callbacks.append(Reset(work, warm))

    trainer, _ = fit(config(eval_loader=None), change, clock)
    expected = (work.done - warm[0]) / STEPS
    assert expected > 0
    assert parts_of(trainer) == dict.fromkeys(PARTS, 0.0) | {part: pytest.approx(expected)}


def test_what_is_recomputed_is_backward(config):
    """Without the rest of the forward, which is computed once: half of the work is in each."""
    clock = VirtualClock()
    work, warm = Work(clock), []

    def change(trainer, vlm):
        llm = vlm.language_model
        llm.model.base_model.layers[0].forward = work.before(llm.model.base_model.layers[0].forward)
        plain = vlm.connector.forward
        # The connector as well as the decoder run twice, each within hooks of its own.
        vlm.connector.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
        call, whole = type(llm).decode, llm
        llm.decode = lambda *a: checkpoint(call, whole, *a, use_reentrant=False)
        trainer.state.callbacks.append(Reset(work, warm))

    trainer, _ = fit(config(eval_loader=None), change, clock)
    half = pytest.approx((work.done - warm[0]) / STEPS / 2)
    expected = {"llm_forward": half, "backward": half}
    assert parts_of(trainer) == dict.fromkeys(PARTS, 0.0) | expected


def test_evaluation_is_no_part_of_a_step(config):
    clock = VirtualClock()
    work = Work(clock)

    def change(trainer, vlm):
        slow_callback(trainer, vlm, Work(clock))
        tower = vlm.vision_tower.model
        plain = tower.forward

        def forward(*arguments, **options):
            if not trainer.state.model.training:
                work()
            return plain(*arguments, **options)

        tower.forward = forward

    trainer, _ = fit(config(eval_interval="1ba"), change, clock)
    assert work.done > 0
    assert parts_of(trainer) == dict.fromkeys(PARTS, 0.0) | {"other": pytest.approx(1)}


def test_waiting_for_data_is_warned_of(config, caplog):
    clock = VirtualClock()
    fit(config(), lambda trainer, vlm: slow_data(trainer, vlm, Work(clock)), clock)
    lines = [x.getMessage() for x in caplog.records if "is waiting for data" in x.getMessage()]
    assert len(lines) == 1
    assert "100% of a step" in lines[0]
    assert "raise train_loader.num_workers" in lines[0]


def test_each_interval_stands_for_itself(config):
    trainer, stopwatch = fit(
        config(callbacks={"step_times": {"warmup_batches": 0, "interval": "2ba"}})
    )
    steps = stopwatch.steps
    waits = [value for _, value in metrics_of(trainer)["time/data_wait"]]
    totals = [sum(metrics_of(trainer)[f"time/{part}"][i][1] for part in PARTS) for i in range(2)]
    assert len(waits) == 2  # after batches 2 and 4; nothing is left at the end
    assert totals[0] == pytest.approx(sum(steps[:2]) / 2)
    assert totals[1] == pytest.approx(sum(steps[2:]) / 2)


def test_the_model_is_left_without_hooks(config):
    trainer, _ = fit(config())
    model = trainer.state.model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "parallelism",
    [
        {"parallelism": "replicate"},
        {"parallelism": "shard"},
        {"parallelism": "shard", "fsdp_config": {"activation_checkpointing": True}},
    ],
    ids=["replicate", "shard", "checkpointing"],
)
def test_two_ranks(config, parallelism):
    trainer, stopwatch = fit(config(**parallelism))
    parts = parts_of(trainer)
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(sum(stopwatch.steps[1:]) / STEPS)


class SlowDevice:
    """A device that comes to a mark only when it is waited for, as a GPU with a long queue."""

    def __init__(self):
        self.marks = self.past = 0

    def mark(self):
        self.marks += 1
        return self.marks

    def is_past(self, mark):
        return mark <= self.past

    def wait_for(self, mark):
        self.past = max(self.past, mark)

    def seconds(self, start, end):
        assert end <= self.past, "read before the device has got there"
        return float(end - start)


def test_marks_are_read_once_the_device_has_passed_them(config):
    device = SlowDevice()

    read = []

    class Record(Callback):
        def batch_end(self, state, logger):
            read.append(device.past)

    def change(trainer, vlm):
        trainer.state.callbacks.append(Record())

    trainer, _ = fit(config(), change, device)
    assert read == [0] * (STEPS + 1)  # nothing waited before the report
    assert sum(parts_of(trainer).values()) > 10
    assert device.past == device.marks
