"""The split: its numbers, and that nothing but its arguments decides it."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import ConversionError
from convert.split import assign_sides, num_eval

steady = settings(deadline=None, derandomize=True, database=None)
counts = st.integers(1, 3000)
ratios = st.decimals(0, "0.99", places=3).map(float)
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("max_samples", "train", "evaluation"), [(None, 546_965, 11_163), (5_000, 4_900, 100)]
)
def test_numbers_of_the_spec(max_samples: int | None, train: int, evaluation: int) -> None:
    sides = assign_sides(558_128, 0.02, max_samples, seed=17)
    assert sides.count("train") == train
    assert sides.count("eval") == evaluation
    assert sides.count(None) == 558_128 - train - evaluation


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
@given(num_items=counts, ratio=ratios, seed=seeds, data=st.data())
def test_sides_for_other_sizes(
    num_items: int, ratio: float, seed: int, data: st.DataObject
) -> None:
    max_samples = data.draw(st.none() | st.integers(1, num_items))
    sides = assign_sides(num_items, ratio, max_samples, seed)
    taken = num_items if max_samples is None else max_samples
    assert len(sides) == num_items  # a list: no item can be on two sides
    assert sides.count("eval") == num_eval(taken, ratio)
    assert sides.count("train") == taken - num_eval(taken, ratio)
    assert sides == assign_sides(num_items, ratio, max_samples, seed)


@steady
@given(num_items=st.integers(2, 3000), ratio=ratios, seed=seeds, data=st.data())
def test_more_samples_contain_the_fewer(
    num_items: int, ratio: float, seed: int, data: st.DataObject
) -> None:
    fewer = data.draw(st.integers(1, num_items - 1))
    some = assign_sides(num_items, ratio, fewer, seed)
    more = assign_sides(num_items, ratio, fewer + 1, seed)
    assert all(more[item] is not None for item, side in enumerate(some) if side is not None)


def test_the_permutation_never_changes() -> None:
    """An upgrade of numpy that moved samples between train and eval would show here."""
    sides = assign_sides(20, 0.2, 10, seed=17)
    assert [item for item, side in enumerate(sides) if side == "eval"] == [3, 14]
    assert [item for item, side in enumerate(sides) if side == "train"] == [
        1,
        2,
        5,
        8,
        10,
        11,
        12,
        13,
    ]


def test_another_seed_gives_another_split() -> None:
    assert assign_sides(1000, 0.5, None, seed=1) != assign_sides(1000, 0.5, None, seed=2)


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
        assign_sides(10, **settings)
