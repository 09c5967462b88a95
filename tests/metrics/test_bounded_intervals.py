"""Intervals of what is no share: none is a point where all numbers agree, and they hold what they should."""

import numpy as np
import pytest

from compresso.errors import DataError
from compresso.metrics.intervals import bounded_mean
from compresso.metrics.trust.dimension import Part


@pytest.mark.parametrize("n", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("value", [0.0, 0.47, 1.0])
def test_numbers_that_agree_leave_a_width_that_shrinks(n: int, value: float) -> None:
    low, high = bounded_mean([value] * n)
    assert 0 <= low <= value <= high <= 1 and high - low > 1 / (n + 3)
    assert bounded_mean([value] * (4 * n)) != (low, high)


def test_of_zeros_and_ones_it_is_agresti_and_coulls() -> None:
    n, k, z = 36, 9, 1.959963984540054
    total, share = n + z * z, (k + z * z / 2) / (n + z * z)
    reach = z * (share * (1 - share) / total) ** 0.5
    assert bounded_mean([1.0] * k + [0.0] * (n - k)) == pytest.approx((share - reach, share + reach))


@pytest.mark.parametrize("n", [3, 10, 50])
def test_it_covers_the_mean(n: int) -> None:
    """Of numbers of a skewed distribution at least 93 of 100 intervals of 95 % hold the mean."""
    drawn = np.random.default_rng(0).beta(0.5, 2.0, (2000, n))
    hits = sum(low <= 0.2 <= high for low, high in (bounded_mean(one.tolist()) for one in drawn))
    assert hits / 2000 > 0.93


def test_none_have_no_mean() -> None:
    with pytest.raises(DataError, match="no numbers"):
        bounded_mean([])


def _fair(rate_a: float, rate_b: float, n: int) -> Part:
    half = n // 2
    marks = [float(i < round(rate * half)) for rate in (rate_a, rate_b) for i in range(half)]
    return Part("p", tuple(map(str, range(n))), tuple(marks), ("a",) * half + ("b",) * half)


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("n", [8, 96])
def test_a_difference_of_groups_that_all_answer_alike_has_a_width(rate: float, n: int) -> None:
    part = _fair(rate, rate, n)
    rise, (low, high) = part.change(part)
    assert rise == 0 and low < -1 / n and high > 1 / n


def test_a_difference_of_groups_that_changed_much_is_still_seen() -> None:
    rise, (low, high) = _fair(0.5, 0.5, 192).change(_fair(1.0, 0.25, 192))
    assert rise == pytest.approx(-0.75) and low < rise < high < -0.3


def test_draws_that_agree_leave_a_width() -> None:
    part = Part("toxicity", ("1", "2", "3"), (0.47, 0.47, 0.47))
    low, high = part.interval()
    assert low < 0.4 and high > 0.6
    rise, (low, high) = part.change(Part("toxicity", part.ids, (0.55,) * 3))
    assert rise == pytest.approx(0.08) and low < 0 < high
