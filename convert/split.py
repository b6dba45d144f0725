"""Which items are converted, and which of them are held out for evaluation."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from convert.errors import ConversionError

Side = Literal["train", "eval"]
SIDES: tuple[Side, ...] = ("train", "eval")

NOT_TAKEN, TRAIN, EVAL = 0, 1, 2
"""What `Split.sides` says of an item."""

_ROUNDS = 12
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


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


class Permutation:
    """A pseudorandom order of `range(size)` that is computed where it is asked for.

    A shuffled list of a billion numbers has 8 GB, and every process would need it. This is a
    Feistel network instead (Luby and Rackoff, 1988): a number is cut into two halves of bits, and
    each round adds a hash of one half to the other, which can be undone and is therefore
    one-to-one. It permutes a power of two below 2 · `size`; what lands at or above `size` goes
    through again until it does not ("cycle walking", Black and Rogaway, 2002).

    Nothing of it depends on a library's random numbers: no upgrade can move a sample across.

    Args:
        size: How many numbers, at least 1.
        seed: From 0 to 2³² - 1.
    """

    def __init__(self, size: int, seed: int) -> None:
        bits = max((size - 1).bit_length(), 2)
        self._size = size
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << bits // 2) - 1)
        self._high = np.uint64((1 << (bits - bits // 2)) - 1)
        # The size is part of the key: otherwise orders of two sizes would share long runs.
        start = _mix(np.array([seed, size], np.uint64))
        self._keys = [
            _mix(np.array([int(start[0] ^ (start[1] >> np.uint64(1))) + k * _GOLDEN & _WORD]))[0]
            for k in range(1, _ROUNDS + 1)
        ]

    def positions(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where in the order some of the numbers stand.

        Args:
            numbers: From 0 to `size` - 1.

        Returns:
            As many positions, from 0 to `size` - 1.
        """
        found = self._permute(numbers.astype(np.uint64))
        while (outside := found >= self._size).any():
            found[outside] = self._permute(found[outside])
        return found.astype(np.int64)

    def _permute(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        low, high = numbers & self._low, numbers >> self._low_bits
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            high = high ^ (_mix(low ^ first) & self._high)
            low = low ^ (_mix(high ^ second) & self._low)
        return (high << self._low_bits) | low


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash 64-bit words: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    words = words.astype(np.uint64)
    words = (words ^ (words >> np.uint64(30))) * _MIX[0]
    words = (words ^ (words >> np.uint64(27))) * _MIX[1]
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class Split:
    """Deals the items of all sources to a side.

    One seeded permutation of all the items decides: `max_samples` takes the first N of it, and of
    those the first `num_eval` are for evaluation. An item's side depends on nothing else, so one
    that is rejected later moves no other item across. (Items that share an image are put together
    afterwards: see `duplicates`.)

    Args:
        num_items: Items of all sources together.
        eval_ratio: Share of the evaluation side, at least 0 and below 1.
        max_samples: How many items to take in all; None takes them all.
        seed: Seed of the permutation, from 0 to 2³² - 1.

    Raises:
        ConversionError: If a setting is out of its range, or `max_samples` is more than there are.
    """

    num_items: int
    eval_ratio: float
    max_samples: int | None
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.eval_ratio < 1:  # also refuses nan
            raise ConversionError(
                f"eval_ratio is {self.eval_ratio}: give a number of at least 0 and below 1"
            )
        if not 0 <= self.seed < 2**32:
            raise ConversionError(f"seed is {self.seed}: give a whole number from 0 to {2**32 - 1}")
        if self.max_samples is not None and not 1 <= self.max_samples <= self.num_items:
            raise ConversionError(
                f"max_samples is {self.max_samples}, and the source has {self.num_items} items: "
                f"give a number from 1 to {self.num_items}, or leave it out to take them all"
            )

    @property
    def num_taken(self) -> int:
        """Items of both sides."""
        return self.num_items if self.max_samples is None else self.max_samples

    @property
    def num_eval(self) -> int:
        """Items of the evaluation side."""
        return num_eval(self.num_taken, self.eval_ratio)

    def sides(self, start: int, count: int) -> npt.NDArray[np.int8]:
        """The sides of consecutive items.

        Args:
            start: Index of the first.
            count: How many.

        Returns:
            For each `TRAIN`, `EVAL` or `NOT_TAKEN`.
        """
        numbers = np.arange(start, start + count, dtype=np.int64)
        positions = Permutation(self.num_items, self.seed).positions(numbers)
        sides = np.full(count, TRAIN, np.int8)
        sides[positions < self.num_eval] = EVAL
        sides[positions >= self.num_taken] = NOT_TAKEN
        return sides
