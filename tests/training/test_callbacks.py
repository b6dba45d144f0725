"""What a run logs: speed, cut answers, metrics to a file, learning rate, MFU."""

import logging

import pytest

from runs import last, metrics_of, run
from vlm_composer.data.batches import num_tokens
from vlm_composer.training.metrics_file import read_metrics


def test_the_speed_report_is_logged_at_the_end(tiny_config, caplog):
    with caplog.at_level(logging.INFO, logger="vlm_composer"):
        trainer, _, _ = run(
            tiny_config(
                max_duration="5ba",
                callbacks={"speed_report": {"warmup_batches": 2, "full_epoch_samples": 546965}},
            )
        )
    line = next(r.getMessage() for r in caplog.records if "Average step time" in r.getMessage())
    assert "one epoch of 546,965 samples" in line
    assert "measured over 3 steps after 2 of warm-up" in line
    seconds, rate = last(trainer, "speed/step_seconds"), last(trainer, "speed/samples_per_second")
    assert rate * seconds == pytest.approx(8)
    assert last(trainer, "speed/full_epoch_hours") == pytest.approx(546965 / rate / 3600)


def test_the_speed_report_also_comes_at_its_interval(tiny_config):
    trainer, _, _ = run(
        tiny_config(callbacks={"speed_report": {"warmup_batches": 1, "interval": "2ba"}})
    )
    assert len(metrics_of(trainer)["speed/step_seconds"]) == 3  # batches 2 and 4, and the end


def test_a_run_of_warm_up_alone_says_so(tiny_config, caplog):
    run(tiny_config(max_duration="1ba", callbacks={"speed_report": {}}))
    assert any("ended within its 3 warm-up steps" in r.getMessage() for r in caplog.records)


def test_cut_answers_are_counted(tiny_config, caplog):
    trainer, _, _ = run(tiny_config(max_duration="1ep", max_seq_len=30))
    _, _, watch = run(tiny_config(max_duration="1ep"))
    excess = [
        length - 30
        for batch in watch.batches
        for length in map(len, batch["input_ids"])
        if length > 30
    ]
    assert excess
    assert last(trainer, "data/cut_answers") == len(excess)
    assert last(trainer, "data/cut_answer_tokens") == sum(excess)
    assert any(f"{len(excess)} answers were longer" in r.getMessage() for r in caplog.records)


def test_metrics_go_to_a_file_that_reads_back(tiny_config):
    config = tiny_config(loggers={"jsonl": {}}, callbacks={"lr_monitor": {}})
    _, _, watch = run(config)
    metrics = read_metrics(config.folder("{run_folder}/metrics.jsonl"))
    assert [value for _, value in metrics["loss/train/total"]] == watch.losses
    assert "metrics/eval/LanguageCrossEntropy" in metrics
    assert "lr-AdamW/group0" in metrics


def test_the_speed_monitor_logs_samples_tokens_and_mfu(tiny_config):
    trainer, vlm, watch = run(
        tiny_config(
            max_duration="4ba",
            callbacks={"speed_monitor": {"window_size": 2, "gpu_flops_available": 1e9}},
        )
    )
    data = metrics_of(trainer)
    rate = last(trainer, "throughput/samples_per_sec")
    tokens = sum(num_tokens(batch)["total"] for batch in watch.batches[-2:])
    per_second = last(trainer, "throughput/tokens_per_sec")
    assert per_second / rate == pytest.approx(tokens / 16, rel=1e-3)
    model = trainer.state.model
    flops = sum(model.flops_per_batch(batch) for batch in watch.batches[-2:])
    assert last(trainer, "throughput/flops_per_sec") / rate == pytest.approx(flops / 16, rel=1e-3)
    mfu = last(trainer, "throughput/device/mfu")
    assert mfu == pytest.approx(last(trainer, "throughput/flops_per_sec") / 1e9)
    assert "throughput/device/mfu" in data
    assert vlm is model.model


def test_clipping_bounds_the_update(tiny_config):
    clipping = {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1e-3}}
    _, _, free = run(tiny_config(max_duration="1ba"))
    _, _, clipped = run(tiny_config(max_duration="1ba", algorithms=clipping))

    def norm(watch):
        return sum(float(g.square().sum()) for g in watch.gradients[0].values()) ** 0.5

    assert norm(free) > 1e-2
    assert norm(clipped) == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_warms_up_and_falls(tiny_config):
    trainer, _, _ = run(
        tiny_config(
            max_duration="10ba",
            callbacks={"lr_monitor": {}},
            scheduler={"t_warmup": "0.2dur", "alpha_f": 0.1},
        )
    )
    rates = [value for _, value in metrics_of(trainer)["lr-AdamW/group0"]]
    assert rates[0] == 0
    assert rates[2] == pytest.approx(1e-3)
    assert rates == [*sorted(rates[:3]), *sorted(rates[3:], reverse=True)]
    assert rates[-1] < 2.5e-4
