"""Whether the connector learned to see, in words for somebody who has never trained one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vlm_composer.report.run_folder import Run
from vlm_composer.report.text import number

CLEAR_GAP = 0.3
"""Nats a token that the right image must be worth for a plain yes; as the demo asks."""
OPEN_GAP = 0.05
"""Below it images make no difference; as the live warnings ask, unless the run's yaml asks
otherwise."""

Tone = Literal["good", "middling", "bad", "unknown"]


@dataclass(frozen=True)
class Fact:
    """A number, and what it means."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Verdict:
    """What the page begins with."""

    tone: Tone
    headline: str
    why: str
    facts: list[Fact]
    next_steps: list[str]


def judge(run: Run) -> Verdict:
    """Judge a run by its newest evaluation."""
    gap_points, source = gap_of(run)
    tone, headline, why = _headline(run, gap_points)
    facts = [state_of_run(run), _gap_fact(gap_points, source), _blank_fact(run)]
    facts += [_retrieval_fact(run), _loss_fact(run), _warnings_fact(run)]
    return Verdict(tone, headline, why, facts, _next_steps(run, tone, gap_points))


def gap_of(run: Run) -> tuple[list[tuple[int, float]], str]:
    """The grounding gap at each evaluation, and of what it was taken.

    Of the fixed subset (`evidence/gap_wrong`), or else of the whole evaluation set, where the yaml
    has `mismatched_images`.
    """
    if points := run.values("evidence/gap_wrong"):
        return points, "a fixed part of the evaluation set"
    right = dict(run.values("metrics/eval/LanguageCrossEntropy"))
    wrong = run.values("metrics/eval_mismatched/LanguageCrossEntropy")
    return [(x, y - right[x]) for x, y in wrong if x in right], "the whole evaluation set"


def state_of_run(run: Run) -> Fact:
    """How far the run has come."""
    target = run.fact("config", "max_duration")
    where = f"batch {run.last_batch:,}" + (f" of a run of {target}" if target else "")
    if run.fact("ended"):
        return Fact("The run", "finished", f"It ended at {where}.")
    if run.facts is None:
        return Fact(
            "The run",
            where,
            "Whether it is finished is not known: its folder has no run.json.",
        )
    return Fact(
        "The run",
        "not finished",
        f"It is at {where}: it still goes on, or was stopped. This page is of what there was when "
        "it was written.",
    )


def _headline(run: Run, gaps: list[tuple[int, float]]) -> tuple[Tone, str, str]:
    train = run.last("loss/train/total")
    if train is not None and not math.isfinite(train):
        return (
            "bad",
            "No: the run broke.",
            f"Its training loss became {number(train)}, which is not a number to learn from; "
            "whatever was learned before stands in the checkpoints before that batch.",
        )
    if not gaps:
        return (
            "unknown",
            "It cannot be told.",
            "Nobody asked the model to tell right images from wrong ones during this run, so that "
            "its loss alone is known. A language model guesses captions without any image, and "
            "then the loss falls as well.",
        )
    batch, gap = gaps[-1]
    if batch == 0:
        return (
            "unknown",
            "It is too early to tell.",
            "The only evaluation so far is that before training.",
        )
    if not math.isfinite(gap):
        return (
            "bad",
            "No: the run broke.",
            f"At its last evaluation the losses were not finite (the gap is {number(gap)}).",
        )
    worth = (
        f"With the right image the model finds a true caption {_times(gap)} × as likely, "
        "word piece by word piece, as with the image of something else."
    )
    least = _least_gap(run)
    if gap >= max(CLEAR_GAP, least):
        if _beats_chance(run) is False:
            return (
                "middling",
                "Probably: the image helps, but captions are not told apart.",
                worth + " Yet it does not find an image's own caption among others more often "
                "than by guessing.",
            )
        return "good", "Yes: the connector learned to see.", worth
    if gap >= least:
        return (
            "middling",
            "A little: seeing sets in.",
            worth
            + f" From {_times(CLEAR_GAP)} × on this page says yes."
            + (
                " It does not yet find an image's own caption more often than by guessing."
                if _beats_chance(run) is False
                else ""
            ),
        )
    if run.fact("ended") is None:
        return (
            "unknown" if run.facts is not None else "bad",
            "Not yet: the images make no difference so far.",
            worth + " That is usual for a while: then the gap opens.",
        )
    return (
        "bad",
        "No: the language model does not look at the images.",
        worth + " It learned how captions sound, not what is to be seen.",
    )


def _times(gap: float) -> str:
    """How many times likelier a word piece is."""
    return number(math.exp(min(gap, 50)))


def _least_gap(run: Run) -> float:
    asked = run.fact("config", "callbacks", "warnings", "min_gap")
    return float(asked) if isinstance(asked, int | float) else OPEN_GAP


def _beats_chance(run: Run) -> bool | None:
    """Whether retrieval is above chance by two standard errors; None where that is not known."""
    found, chance = run.last("evidence/retrieval_accuracy"), run.last("evidence/retrieval_chance")
    if found is None or chance is None or not math.isfinite(found + chance):
        return None
    samples = run.fact("config", "callbacks", "evidence", "num_samples")
    count = samples if isinstance(samples, int) and samples > 0 else 64
    of_set = run.fact("data", "eval", "samples")
    count = min(count, of_set) if isinstance(of_set, int) and of_set > 0 else count
    return found > chance + 2 * math.sqrt(max(chance * (1 - chance), 0) / count)


def _gap_fact(gaps: list[tuple[int, float]], source: str) -> Fact:
    name = "Grounding gap"
    if not gaps:
        return Fact(
            name,
            "not measured",
            "What the right image is worth against a wrong one. callbacks.evidence measures it at "
            "each evaluation; it was off in this run, or no evaluation has ended yet.",
        )
    return Fact(
        name,
        f"{number(gaps[-1][1])} nats a token",
        "How much worse the model predicts true captions when it is shown another sample's image. "
        f"0: it does not look. {OPEN_GAP}: it begins to. {CLEAR_GAP} or more: it sees. Measured "
        f"{len(gaps)} time{'s' * (len(gaps) != 1)}, on {source}, newest after batch "
        f"{gaps[-1][0]:,}.",
    )


def _blank_fact(run: Run) -> Fact:
    gap = run.last("evidence/gap_blank")
    return Fact(
        "Gap to a blank image",
        "not measured" if gap is None else f"{number(gap)} nats a token",
        "The same with a grey image in place of a wrong one."
        + (" Needs callbacks.evidence as well." if gap is None else ""),
    )


def _retrieval_fact(run: Run) -> Fact:
    found, chance = run.last("evidence/retrieval_accuracy"), run.last("evidence/retrieval_chance")
    name = "Finding an image's own caption"
    if found is None or chance is None:
        return Fact(name, "not measured", "Among several captions. Needs callbacks.evidence.")
    above = {
        True: "That is more than luck.",
        False: "With so few images that can be luck.",
        None: "",
    }[_beats_chance(run)]
    return Fact(
        name,
        f"{found:.0%} (guessing: {chance:.0%})",
        "How often the model finds the true caption likelier than all the others that it is shown "
        f"beside it. {above}".strip(),
    )


def _loss_fact(run: Run) -> Fact:
    points = run.values("metrics/eval/LanguageCrossEntropy") or run.values("evidence/loss_right")
    name = "Loss on held-out samples"
    if not points:
        return Fact(
            name,
            "not measured",
            "The run was not evaluated: its yaml has no eval_loader, or eval_interval has not "
            "passed yet.",
        )
    (first, before), (last, after) = points[0], points[-1]
    value, when = f"{number(after)} nats a token", ""
    if last > first:
        value = f"from {number(before)} to {number(after)} nats a token"
        when = "Before training" if first == 0 else f"After batch {first:,}"
        when += f", and after batch {last:,}. "
    return Fact(
        name,
        value,
        when
        + "How surprised the model is by true captions that it never trained on. It should fall; "
        "how low it gets depends on the data, and it falls a good deal without seeing anything.",
    )


def _warnings_fact(run: Run) -> Fact:
    count = len(run.warnings)
    if count:
        return Fact("Warnings", str(count), "They are below, each with what to do.")
    watched = run.facts is not None and run.fact("config", "callbacks", "warnings") is not None
    return Fact(
        "Warnings",
        "none" if watched else "none known",
        "The run was watched for spikes, exploding gradients, a collapsed connector and the like."
        if watched
        else "There is no warnings.jsonl, and whether the run was watched (callbacks.warnings) is "
        "not known, or it was not.",
    )


def _next_steps(run: Run, tone: Tone, gaps: list[tuple[int, float]]) -> list[str]:
    steps = []
    if not gaps:
        steps.append(
            "Set callbacks.evidence and an eval_loader in the yaml and resume or repeat the run; "
            "then this page can tell."
        )
    elif tone in ("bad", "middling") and math.isfinite(gaps[-1][1]):
        if len(gaps) > 1 and gaps[-1][1] > gaps[-2][1]:
            steps.append("The gap still grows: train longer (max_duration).")
        else:
            steps.append(
                "The gap does not grow: lower optimizer.lr where the connector's output is "
                "hundreds of times as large as an embedding, raise it where not, set "
                "connector.vision_ln: true, and look whether captions belong to their images "
                "(below)."
            )
    if run.warnings:
        steps.append("Read the warnings below.")
    if tone == "good":
        steps.append(
            "Look at the captions below. After this stage they often name what is most striking "
            "and are wrong in the details; the same caption under every picture would be a fault."
        )
    return steps
