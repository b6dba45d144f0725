"""Every unit of time that a yaml may use, in real runs."""

import time

import pytest
from composer.core import Callback

from checkpoints import folder_of
from runs import metrics_of, start
from vlm_composer.preflight.report import PreflightError


class Clock(Callback):
    """Makes every batch last 0.4 s."""

    def batch_start(self, state, logger):
        time.sleep(0.4)


@pytest.mark.parametrize(
    ("length", "warmup", "every", "batches", "at"),
    [
        ("2ep", "3ba", "1ep", 10, [5, 10]),
        ("10ba", "1ep", "3ba", 10, [3, 6, 9, 10]),
        ("80sp", "20sp", "20sp", 10, [3, 5, 8, 10]),
        ("2000tok", "500tok", "500tok", 9, [2, 5, 7, 9]),
        ("2ep", "0.1dur", "0.3dur", 10, [3, 6, 9, 10]),
        ("80sp", "0dur", "0.3dur", 10, [3, 6, 9, 10]),
        ("2000tok", "0.5dur", "0.3dur", 9, [3, 5, 8, 9]),
    ],
)
def test_a_run_keeps_the_times_of_its_yaml(tiny_config, length, warmup, every, batches, at):
    assert timed_run(tiny_config, length, warmup, every, batches) == at


@pytest.mark.parametrize("every", ["1sec", "0h0m1s"])
def test_a_run_does_things_by_the_clock(tiny_config, every):
    at = timed_run(tiny_config, "5ba", "0.5dur", every, 5)
    assert at[-1] == 5
    assert len(at) >= 2  # in 2 s or more


def timed_run(tiny_config, length, warmup, every, batches):
    """Run with every interval at `every`, and return the batches at which it evaluated."""
    report = {"interval": every, "warmup_batches": 0}
    config = tiny_config(
        max_duration=length,
        scheduler={"t_warmup": warmup},
        eval_interval=every,
        save_interval=every,
        save_folder="{run_folder}/checkpoints",
        log_to_console=True,
        console_log_interval=every if every[-2:] in ("ep", "ba") else "1ba",
        callbacks={"speed_report": report, "step_times": report, "lr_monitor": {}},
    )
    trainer, _, watch = start(config)
    if every.endswith("s") or every.endswith("sec"):
        trainer.state.callbacks.append(Clock())
    trainer.fit()
    trainer.close()
    logged = metrics_of(trainer)
    assert len(watch.losses) == batches
    at = [int(at.batch) for at, _ in logged["metrics/eval/LanguageCrossEntropy"]]
    assert [int(at.batch) for at, _ in logged["time/data_wait_share"]] == at
    names = [path.stem for path in folder_of(config).glob("ep*")]
    assert sorted({int(name.partition("-ba")[2]) for name in names}) == at
    rates = [float(rate) for _, rate in logged["lr-AdamW/group0"]]
    assert max(rates) == pytest.approx(1e-3, rel=0.25)
    return at


def test_a_warm_up_longer_than_its_epochs_is_refused(tiny_config):
    config = tiny_config(max_duration="1ep", scheduler={"t_warmup": "6ba"})
    match = r"t_warmup: '6ba' is longer than max_duration: '1ep' \(an epoch has 5 batches\)"
    with pytest.raises(PreflightError, match=match):
        start(config)
