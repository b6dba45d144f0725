"""The charts of a run: what it logged over its batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from vlm_composer.report.axes import smooth
from vlm_composer.report.charts import Series, draw_figure, line_chart, stacked_chart
from vlm_composer.report.run_folder import Run
from vlm_composer.report.verdict import CLEAR_GAP, gap_of
from vlm_composer.training.step_parts import PARTS

SMOOTH_FROM = 40
"""Losses from which on a running mean is drawn over them."""


def charts_of(run: Run) -> list[Markup]:
    """Every chart; in place of one without values what is missing and why."""
    return [
        _loss(run),
        _gap(run),
        _retrieval(run),
        _perplexity(run),
        _output(run),
        _learning_rate(run),
        _gradients(run),
        _throughput(run),
        _step_times(run),
        _data_wait(run),
    ]


def _present(*series: Series) -> list[Series]:
    return [each for each in series if each.points]


def _lines(title: str, why: str, series: Sequence[Series], **options: object) -> Markup:
    chosen = _present(*series)
    return line_chart(title, chosen, **options) if chosen else draw_figure(title, missing=why)  # type: ignore[arg-type]


def _loss(run: Run) -> Markup:
    train = run.values("loss/train/total")
    lines = [Series("training", train)]
    if len(train) >= SMOOTH_FROM:
        window = len(train) // 20
        mean = smooth(train, window)
        lines = [
            Series("training, each batch", train, faint=True),
            Series(f"training, mean of {window} batches", mean),
        ]
    return _lines(
        "Loss",
        "the run has not finished a batch yet.",
        [
            *lines,
            Series("held out", run.values("metrics/eval/LanguageCrossEntropy")),
            Series(
                "held out, wrong images", run.values("metrics/eval_mismatched/LanguageCrossEntropy")
            ),
        ],
        unit="nats a token",
        explain="Lower is better. Where the held-out line rises while training falls, the "
        "connector learns its samples by heart.",
    )


def _gap(run: Run) -> Markup:
    points, source = gap_of(run)
    return _lines(
        "Grounding gap",
        "no evaluation compared right images with wrong ones. Set callbacks.evidence (or "
        "eval_loader.mismatched_images: true).",
        [
            Series("against another's image", points),
            Series("against a blank image", run.values("evidence/gap_blank")),
        ],
        unit="nats a token",
        level=("clearly sees", CLEAR_GAP),
        from_zero=True,
        explain=f"What the right image is worth, on {source}: near 0 at first, then it opens.",
    )


def _retrieval(run: Run) -> Markup:
    chance = run.last("evidence/retrieval_chance")
    return _lines(
        "Finding an image's own caption",
        "it is measured by callbacks.evidence, at each evaluation.",
        [Series("found", run.values("evidence/retrieval_accuracy"))],
        unit="share of images",
        level=("guessing", chance) if chance is not None and math.isfinite(chance) else None,
        from_zero=True,
        explain="Above the dashed line the model tells images apart.",
    )


def _perplexity(run: Run) -> Markup:
    return _lines(
        "Perplexity",
        "no evaluation logged it.",
        [
            Series(
                "right image",
                run.values("evidence/perplexity_right")
                or run.values("metrics/eval/LanguagePerplexity"),
            ),
            Series(
                "another's image",
                run.values("evidence/perplexity_wrong")
                or run.values("metrics/eval_mismatched/LanguagePerplexity"),
            ),
            Series("blank image", run.values("evidence/perplexity_blank")),
        ],
        explain="The loss in other words: among how many word pieces the model hesitates.",
    )


def _output(run: Run) -> Markup:
    return _lines(
        "What leaves the connector",
        "it is measured by callbacks.evidence, at each evaluation.",
        [
            Series("size against word embeddings", run.values("evidence/output_norm_ratio")),
            Series("difference between images", run.values("evidence/output_spread")),
            Series("share of latents alive", run.values("evidence/latent_spread")),
        ],
        from_zero=True,
        explain="A difference near 0 means that every image is the same to the language model; a "
        "size that grows without end, that the learning rate is too high.",
    )


def _learning_rate(run: Run) -> Markup:
    names = sorted(name for name in run.metrics if name.startswith("lr-"))
    return _lines(
        "Learning rate",
        "callbacks.lr_monitor was off.",
        [Series(name.removeprefix("lr-"), run.values(name)) for name in names],
        from_zero=True,
    )


def _gradients(run: Run) -> Markup:
    return _lines(
        "Gradient norm",
        "neither callbacks.warnings nor callbacks.optimizer_monitor was on, which log it.",
        [
            Series("before clipping", run.values("gradients/norm")),
            Series("after clipping", run.values("l2_norm/grad/global")),
        ],
        explain="Spikes are bounded by clipping; 0 means that nothing is learned.",
    )


def _throughput(run: Run) -> Markup:
    return _lines(
        "Throughput",
        "neither callbacks.speed_monitor nor callbacks.speed_report logged it: they are off, or "
        "the run is shorter than their first batches.",
        [
            Series("last batches", run.values("throughput/samples_per_sec")),
            Series("whole run", run.values("speed/samples_per_second")),
        ],
        unit="samples/s",
        from_zero=True,
    )


def _step_times(run: Run) -> Markup:
    parts = {text: run.values(f"time/{part}") for part, text in PARTS.items()}
    present = {text: points for text, points in parts.items() if points}
    title = "Where a step's time goes"
    if not present:
        return draw_figure(
            title,
            missing="callbacks.step_times was off, or the run is shorter than its first batches.",
        )
    return stacked_chart(title, present, unit="s a step", explain="A bar is the mean of its steps.")


def _data_wait(run: Run) -> Markup:
    points = [(x, 100 * y) for x, y in run.values("time/data_wait_share")]
    return _lines(
        "Waiting for data",
        "callbacks.step_times was off, or the run is shorter than its first batches.",
        [Series("share of a step", points)],
        unit="%",
        level=("warned of from", 5.0),
        from_zero=True,
        explain="Much of it means that reading and decoding images is the bottleneck.",
    )
