"""The split: its numbers, and that nothing but its arguments decides it."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import ConversionError
from convert.split import EVAL, NOT_TAKEN, TRAIN, Permutation, Split, num_eval

steady = settings(deadline=None, derandomize=True, database=None)
counts = st.integers(1, 3000)
ratios = st.decimals(0, "0.99", places=3).map(float)
seeds = st.integers(0, 2**32 - 1)


def order(size: int, seed: int) -> np.ndarray:
    return Permutation(size, seed).positions(np.arange(size))


@pytest.mark.parametrize(
    ("max_samples", "train", "evaluation"), [(None, 546_965, 11_163), (5_000, 4_900, 100)]
)
def test_numbers_of_the_spec(max_samples: int | None, train: int, evaluation: int) -> None:
    sides = Split(558_128, 0.02, max_samples, seed=17).sides(0, 558_128)
    assert np.count_nonzero(sides == TRAIN) == train
    assert np.count_nonzero(sides == EVAL) == evaluation
    assert np.count_nonzero(sides == NOT_TAKEN) == 558_128 - train - evaluation


@steady
@given(num_samples=counts, ratio=ratios)
def test_eval_is_the_ratio_rounded_half_up(num_samples: int, ratio: float) -> None:
    number = num_eval(num_samples, ratio)
    exact = num_samples * Fraction(str(ratio))
    if ratio == 0 or num_samples == 1:
        assert number == 0
    elif 1 <= math.floor(exact + Fraction(1, 2)) <= num_samples - 1:
        assert -Fraction(1, 2) < number - exact <= Fraction(1, 2)
    else:
        assert number in (1, num_samples - 1)


@pytest.mark.parametrize(
    ("num_samples", "ratio", "expected"),
    [
        (25, 0.02, 1),  # 0.5
        (75, 0.02, 2),  # 1.5
        (100, 0.145, 15),  # 14.5; in floating point 14.499999999999998
        (10, 0.02, 1),  # 0.2, and a ratio above 0 gives one
        (2, 0.9, 1),  # 1.8, and training keeps one
        (1, 0.5, 0),
        (1000, 1e-05, 1),
    ],
)
def test_rounding(num_samples: int, ratio: float, expected: int) -> None:
    assert num_eval(num_samples, ratio) == expected


@steady
@given(size=counts, seed=seeds)
def test_every_position_is_taken_once(size: int, seed: int) -> None:
    assert sorted(order(size, seed).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 10, 1000, 100_000])
def test_every_item_goes_anywhere(size: int) -> None:
    """Over many seeds, the mean position of an item is the middle, and its spread a uniform's."""
    few = np.array([0, 1, size // 2, size - 1])
    runs = 2000
    positions = np.array([Permutation(size, seed).positions(few) for seed in range(runs)])
    deviation = math.sqrt((size**2 - 1) / 12)
    error = 5 * deviation / math.sqrt(runs)
    assert np.abs(positions.mean(axis=0) - (size - 1) / 2).max() < error
    assert np.abs(positions.std(axis=0) - deviation).max() < error


def test_neighbours_are_torn_apart() -> None:
    """Steps between the positions of neighbours are those of two random numbers."""
    steps = np.abs(np.diff(order(100_000, 17))) / 100_000
    expected = [(1 - (1 - x) ** 2) for x in (0.1, 0.25, 0.5)]  # a triangular distribution
    found = [(steps < x).mean() for x in (0.1, 0.25, 0.5)]
    assert found == pytest.approx(expected, abs=0.01)


def test_eval_is_spread_evenly_over_the_source() -> None:
    positions = order(100_000, 3)
    by_tenth = (positions < 10_000).reshape(10, -1).sum(axis=1)
    assert abs(by_tenth - 1000).max() < 5 * math.sqrt(900)


@steady
@given(num_items=counts, ratio=ratios, seed=seeds, data=st.data())
def test_sides_for_other_sizes(
    num_items: int, ratio: float, seed: int, data: st.DataObject
) -> None:
    max_samples = data.draw(st.none() | st.integers(1, num_items))
    split = Split(num_items, ratio, max_samples, seed)
    sides = split.sides(0, num_items)
    taken = num_items if max_samples is None else max_samples
    assert np.count_nonzero(sides == EVAL) == num_eval(taken, ratio)
    assert np.count_nonzero(sides == TRAIN) == taken - num_eval(taken, ratio)
    cut = data.draw(st.integers(0, num_items))  # in parts it is the same
    parts = [split.sides(0, cut), split.sides(cut, num_items - cut)]
    assert np.concatenate(parts).tolist() == sides.tolist()


@steady
@given(num_items=st.integers(2, 3000), ratio=ratios, seed=seeds, data=st.data())
def test_more_samples_contain_the_fewer(
    num_items: int, ratio: float, seed: int, data: st.DataObject
) -> None:
    fewer = data.draw(st.integers(1, num_items - 1))
    some = Split(num_items, ratio, fewer, seed).sides(0, num_items)
    more = Split(num_items, ratio, fewer + 1, seed).sides(0, num_items)
    assert (more[some != NOT_TAKEN] != NOT_TAKEN).all()


RECORDED = [13, 5, 9, 11, 18, 7, 0, 4, 17, 1, 3, 14, 19, 10, 8, 16, 15, 2, 6, 12]


def test_the_permutation_never_changes() -> None:
    """A change that moved samples between train and eval would show here."""
    assert order(20, 17).tolist() == RECORDED
    far = Permutation(10**12, 17).positions(np.array([0, 1, 10**12 - 1]))
    assert far.tolist() == [80659210844, 857004471183, 680317083717]


def test_another_seed_gives_another_split() -> None:
    orders = {tuple(order(1000, seed).tolist()) for seed in range(50)}
    assert len(orders) == 50


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("eval_ratio", ratio) for ratio in (-1, -0.01, 1, 1.5, math.nan, math.inf)),
        *(("max_samples", number) for number in (-1, 0, 11)),
        *(("seed", seed) for seed in (-1, 2**32)),
    ],
)
def test_settings_out_of_range(setting: str, value: float) -> None:
    settings = {"eval_ratio": 0.02, "max_samples": None, "seed": 17, setting: value}
    with pytest.raises(ConversionError, match=f"{setting} is {value}.*: give"):
        Split(10, **settings)
