"""Intervals and tests: coverage by simulation, closed forms from elsewhere, and limits at the ends."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from compresso.errors import DataError
from compresso.metrics.intervals import (
    bootstrap,
    difference_interval,
    holm,
    mcnemar,
    mean_of_parts,
    paired_change,
    rise_interval,
    wilson,
)


def test_mcnemar_is_the_binomial_tail() -> None:
    for b, c in ((3, 9), (0, 5), (7, 7), (1, 0)):
        tail = 2 * binom.cdf(min(b, c), b + c, 0.5)
        assert mcnemar(b, c) == pytest.approx(min(1.0, tail)) == mcnemar(c, b)


def test_holm_by_hand_and_in_any_order() -> None:
    assert holm([0.02, 0.01, 0.04]) == [0.04, 0.03, 0.04]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_unpaired_difference_is_that_of_the_guard_where_the_numbers_are_equal() -> None:
    assert difference_interval(0.6, 50, 0.8, 50) == pytest.approx(rise_interval(0.8, 0.6, 50))


@pytest.mark.parametrize(("before", "moved"), [(0.5, 0.1), (0.8, 0.2), (0.95, 0.04)])
def test_the_paired_interval_covers_as_often_as_it_says(before: float, moved: float) -> None:
    """Items are right with `before`, lose it with `moved` and gain it half as often; 95 % within simulation error."""
    rng, hits, n, rounds = np.random.default_rng(0), 0, 80, 400
    truth = -before * moved + (1 - before) * moved / 2
    for _ in range(rounds):
        was = rng.random(n) < before
        turned = rng.random(n) < np.where(was, moved, moved / 2)
        low, high = paired_change(was.tolist(), (was ^ turned).tolist())
        hits += low <= truth <= high
    assert 0.93 <= hits / rounds <= 0.995


def test_pairing_narrows_and_agreement_does_not_shrink_to_a_point() -> None:
    same = [True] * 30 + [False] * 30
    low, high = paired_change(same, same)
    assert low < 0 < high
    wide = rise_interval(0.5, 0.5, 60)
    assert high - low < (wide[1] - wide[0]) / 2
    low, high = paired_change([True] * 8, [True] * 8)
    assert low < -0.2 and high >= 0


def test_a_mean_of_parts_is_narrower_than_each() -> None:
    part = (0.5, wilson(0.5, 40))
    mean, (low, high) = mean_of_parts([part] * 4)
    assert mean == 0.5 and high - low == pytest.approx((part[1][1] - part[1][0]) / 2)
    with pytest.raises(DataError):
        mean_of_parts([])


def test_the_bootstrap_repeats_and_comes_near_the_normal_interval() -> None:
    marks = np.random.default_rng(1).random(400)
    statistic = lambda places: float(marks[places].mean())  # noqa: E731
    low, high = bootstrap(400, statistic)
    assert (low, high) == bootstrap(400, statistic)
    assert high - low == pytest.approx(2 * 1.96 * marks.std() / math.sqrt(400), rel=0.1)
