"""The statistics of a comparison, against published tables and what must hold for any counts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_core.evaluation.paired_stats import (
    PairedCounts,
    compare,
    compare_values,
    mcnemar,
    paired_interval,
    wilson_interval,
)

numbers = st.integers(0, 300)
tables = st.builds(PairedCounts, both=numbers, lost=numbers, gained=numbers, neither=numbers).filter(
    lambda counts: counts.total > 0
)


def counts(both: int, lost: int, gained: int, neither: int) -> PairedCounts:
    return PairedCounts(both=both, lost=lost, gained=gained, neither=neither)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 6, 2 / 64),
        (2, 8, 0.109375),
        # Fagerland, Lydersen and Laake, 2014: Bentur's and Cavo's data.
        (1, 7, 0.0703125),
        (6, 16, 0.0525),
        # By hand: all of 40 flips one way.
        (40, 0, 2**-39),
    ],
)
def test_mcnemar_of_known_tables(lost: int, gained: int, p: float) -> None:
    assert mcnemar(counts(3, lost, gained, 4)) == pytest.approx(p, rel=1e-3)


def test_mcnemar_of_ten_thousand_flips() -> None:
    assert mcnemar(counts(0, 0, 10_000, 0)) == 0.0
    assert mcnemar(counts(0, 5000, 5000, 0)) == 1.0
    assert 0.04 < mcnemar(counts(0, 4900, 5100, 0)) < 0.06


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Newcombe 1998; the sign is turned where the first of a pair is the later one here.
        ((36, 2, 12, 0), 0.0569, 0.3404),
        # Fagerland, Lydersen and Laake, 2014.
        ((1, 7, 1, 12), -0.507, -0.0256),
        ((59, 16, 6, 80), -0.1186, -0.0046),
    ],
)
def test_paired_intervals_of_published_tables(table: tuple[int, int, int, int], low: float, high: float) -> None:
    assert paired_interval(counts(*table)) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_a_published_table() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


@given(tables)
def test_an_interval_holds_its_difference_and_is_no_wider_than_possible(table: PairedCounts) -> None:
    low, high = paired_interval(table)
    difference = (table.gained - table.lost) / table.total
    assert -1 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1
    assert low < high


@given(tables)
def test_turned_around_everything_is_turned_around(table: PairedCounts) -> None:
    turned = counts(table.both, table.gained, table.lost, table.neither)
    assert mcnemar(turned) == mcnemar(table)
    low, high = paired_interval(table)
    assert paired_interval(turned) == pytest.approx((-high, -low))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(1)
    covered, rounds, asked = 0, 400, 200
    for _ in range(rounds):
        cells = draw.choices(("both", "lost", "gained", "neither"), (60, 5, 15, 20), k=asked)
        low, high = paired_interval(counts(*(cells.count(name) for name in ("both", "lost", "gained", "neither"))))
        covered += low <= 0.10 <= high
    assert 0.92 <= covered / rounds <= 0.98


def pairs(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return before, after


def test_a_comparison_counts_pairs_and_says_what_they_mean() -> None:
    rose = compare("strict accuracy", *pairs(50, 2, 30, 18))
    assert rose.counts == counts(50, 2, 30, 18)
    assert (rose.before, rose.after) == (0.52, 0.8)
    assert rose.difference == pytest.approx(0.28)
    assert rose.verdict.startswith("Strict accuracy rose: 52.0% before, 80.0% after (+28.0 points")
    assert "p < 0.001" in rose.verdict
    assert "100 questions" in rose.verdict
    assert compare("strict accuracy", *pairs(50, 30, 2, 18)).verdict.startswith("Strict accuracy fell")


def test_a_gain_within_the_noise_is_no_change() -> None:
    comparison = compare("lenient accuracy", *pairs(50, 5, 9, 36))
    assert comparison.difference > 0
    assert comparison.verdict.startswith("No significant change in lenient accuracy: 55.0% before, 59.0% after")
    assert comparison.as_dict()["counts"] == {"both": 50, "lost": 5, "gained": 9, "neither": 36}


def test_different_lengths_are_no_pairs() -> None:
    with pytest.raises(ValueError):
        compare("strict accuracy", [True], [True, False])


def test_values_are_compared_in_pairs() -> None:
    rose = compare_values("exact", [0.1 * n for n in range(50)], [0.1 * n + 0.2 + 0.01 * (n % 3) for n in range(50)])
    assert rose is not None
    assert rose.p_value < 0.001
    assert rose.interval[0] < rose.difference < rose.interval[1]
    assert rose.verdict.startswith("The mean of exact rose: 2.45 before, 2.66 after")
    noise = compare_values("exact", [0.0, 1.0] * 20, [1.0, 0.0] * 20)
    assert noise is not None
    assert noise.difference == 0
    assert noise.verdict.startswith("No significant change in the mean of exact")


def test_a_change_that_is_the_same_everywhere_is_no_chance_and_none_is() -> None:
    same, up = compare_values("x", [1.0] * 5, [1.0] * 5), compare_values("x", [1.0] * 5, [2.0] * 5)
    assert same is not None
    assert up is not None
    assert (same.p_value, up.p_value) == (1.0, 0.0)


def test_values_that_are_missing_are_left_out_and_one_pair_is_too_few() -> None:
    found = compare_values("x", [1.0, None, 0.0], [1.0, 1.0, 1.0])
    assert found is not None
    assert found.questions == 2
    assert compare_values("x", [1.0, None], [1.0, 1.0]) is None
