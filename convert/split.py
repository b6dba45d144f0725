"""Which items are converted, and which of them are held out for evaluation."""

from fractions import Fraction
from typing import Literal

import numpy as np

from convert.errors import ConversionError

Side = Literal["train", "eval"]
SIDES: tuple[Side, ...] = ("train", "eval")


def exact(ratio: float) -> Fraction:
    """The decimal number that was typed: 0.29 is 29/100, and 0.29 · 100 is 29, not 28.999…"""
    return Fraction(str(ratio))


def num_eval(num_samples: int, eval_ratio: float) -> int:
    """How many of `num_samples` samples are for evaluation.

    `num_samples` · `eval_ratio`, halves rounded up. A ratio above 0 gives at least one sample, and
    training always keeps at least one.

    Args:
        num_samples: Samples of both sides together, at least 1.
        eval_ratio: Share of the evaluation side, at least 0 and below 1.
    """
    if eval_ratio == 0:
        return 0
    rounded = int(num_samples * exact(eval_ratio) + Fraction(1, 2))
    return min(max(rounded, 1), num_samples - 1)


def assign_sides(
    num_items: int, eval_ratio: float, max_samples: int | None, seed: int
) -> list[Side | None]:
    """Deals every item of the source to a side.

    One seeded permutation of all the items decides: `max_samples` takes the first N of it, and of
    those the first `num_eval` are for evaluation. An item's side depends on nothing else, so one
    that is rejected later moves no other item across.

    The permutation is of numpy's legacy `RandomState`, whose stream is frozen for good (NEP 19).
    `Generator`'s is not, and an upgrade must not move an evaluation sample into train.

    Args:
        num_items: Items in the source.
        eval_ratio: Share of the evaluation side, at least 0 and below 1.
        max_samples: How many items to take in all; None takes them all.
        seed: Seed of the permutation, from 0 to 2³² - 1.

    Returns:
        For each item, in the source's order, its side, or None where it is not taken.

    Raises:
        ConversionError: If a setting is out of its range, or `max_samples` is more than there are.
    """
    if not 0 <= eval_ratio < 1:  # also refuses nan
        raise ConversionError(
            f"eval_ratio is {eval_ratio}: give a number of at least 0 and below 1"
        )
    if not 0 <= seed < 2**32:
        raise ConversionError(f"seed is {seed}: give a whole number from 0 to {2**32 - 1}")
    if max_samples is not None and not 1 <= max_samples <= num_items:
        raise ConversionError(
            f"max_samples is {max_samples}, and the source has {num_items} items: give a number "
            f"from 1 to {num_items}, or leave it out to take them all"
        )
    taken = num_items if max_samples is None else max_samples
    permutation = np.random.RandomState(seed).permutation(num_items)
    first_train = num_eval(taken, eval_ratio)

    sides: list[Side | None] = [None] * num_items
    for position, item in enumerate(permutation[:taken].tolist()):
        sides[item] = "eval" if position < first_train else "train"
    return sides
