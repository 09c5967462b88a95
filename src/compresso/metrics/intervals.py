"""95 % intervals of shares and of what is built from shares, and tests of paired answers.

Shares have closed forms: Wilson's interval of one, Newcombe's of a difference, unpaired (Statistics in Medicine 17,
1998, p. 873, method 10) and paired (the same, p. 2635, method 10), and for means of independent parts the squares of
the distances to the limits added up (the method of variance estimates recovery). Unlike a bootstrap they do not shrink
to a point where all answers agree. Means of numbers in a range are given Agresti and Coull's two additional items at
either end of it (The American Statistician 52, 1998, p. 119; of zeros and ones it is their interval), so that neither
do they. What is none of these is resampled.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from scipy.stats import binomtest

from compresso.errors import DataError
from compresso.metrics.guard import CONFIDENCE, rise_interval, wilson

__all__ = [
    "bootstrap",
    "bounded_mean",
    "distance",
    "holm",
    "mcnemar",
    "mean_of_parts",
    "paired_change",
    "rise_interval",
    "wilson",
]

Interval = tuple[float, float]
RESAMPLES = 2000
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """The interval of the rise of a share, before and after on the same items.

    Raises:
        DataError: no items, or not as many after as before.

    >>> low, high = paired_change([True] * 9 + [False], [True] * 9 + [False])
    >>> low < 0 < high
    True
    """
    n = len(before)
    if not n or len(after) != n:
        raise DataError(f"{n} items before and {len(after)} after; wanted the same ones, at least one")
    both = sum(b and a for b, a in zip(before, after, strict=True))
    neither = sum(not b and not a for b, a in zip(before, after, strict=True))
    only_before = sum(b and not a for b, a in zip(before, after, strict=True))
    only_after = n - both - neither - only_before
    p_before, p_after = sum(before) / n, sum(after) / n
    (low_b, high_b), (low_a, high_a) = wilson(p_before, n), wilson(p_after, n)
    phi = _correlation(both, only_before, only_after, neither)
    rise = p_after - p_before
    down, up = (p_after - low_a, high_b - p_before), (high_a - p_after, p_before - low_b)
    return (
        rise - math.sqrt(max(down[0] ** 2 - 2 * phi * down[0] * down[1] + down[1] ** 2, 0.0)),
        rise + math.sqrt(max(up[0] ** 2 - 2 * phi * up[0] * up[1] + up[1] ** 2, 0.0)),
    )


def _correlation(both: int, only_before: int, only_after: int, neither: int) -> float:
    """Newcombe's phi of a table of pairs, with his correction for continuity; 0 where a margin is empty."""
    n = both + only_before + only_after + neither
    margins = (both + only_before) * (only_after + neither) * (both + only_after) * (only_before + neither)
    if not margins:
        return 0.0
    excess = both * neither - only_before * only_after
    return (max(excess - n / 2, 0.0) if excess > 0 else float(excess)) / math.sqrt(margins)


def distance(interval: Interval) -> Interval:
    """The interval of the absolute value of a number with this interval.

    >>> distance((-0.1, 0.3)), distance((-0.4, -0.2))
    ((0.0, 0.3), (0.2, 0.4))
    """
    low, high = interval
    near = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return near, max(abs(low), abs(high))


def mean_of_parts(parts: Sequence[tuple[float, Interval]]) -> tuple[float, Interval]:
    """The mean of independent numbers with their intervals, and its interval.

    >>> mean_of_parts([(0.5, (0.4, 0.6))])
    (0.5, (0.4, 0.6))
    """
    if not parts:
        raise DataError("no parts to take the mean of")
    k = len(parts)
    mean = sum(value for value, _ in parts) / k
    if k == 1:
        return parts[0]
    down = math.sqrt(sum((value - low) ** 2 for value, (low, _) in parts)) / k
    up = math.sqrt(sum((high - value) ** 2 for value, (_, high) in parts)) / k
    return mean, (mean - down, mean + up)


def bootstrap(n: int, statistic: Callable[[np.ndarray], float], seed: int = 0) -> Interval:
    """The percentile interval of a statistic of `n` items, given places drawn with replacement; reproducible by seed.

    Raises:
        DataError: no items.
    """
    if n < 1:
        raise DataError("no items to resample")
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    values = [statistic(places) for places in drawn]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def bounded_mean(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> Interval:
    """The interval of the mean of independent numbers that lie in a range; of a single one it is the range.

    Raises:
        DataError: no numbers.

    >>> [round(one, 3) for one in bounded_mean([1.0] * 36)], bounded_mean([0.5])
    ([0.885, 1.0], (0.0, 1.0))
    """
    n = len(values)
    if not n:
        raise DataError("no numbers to take the mean of")
    if n == 1:
        return low, high
    ends = _Z**2 / 2
    total, mean = n + 2 * ends, sum(values) / n
    centre = (n * mean + ends * (low + high)) / total
    squares = sum((one - centre) ** 2 for one in values) + ends * ((low - centre) ** 2 + (high - centre) ** 2)
    reach = _Z * math.sqrt(squares / total / total)
    return max(low, min(mean, centre - reach)), min(high, max(mean, centre + reach))


def mcnemar(only_before: int, only_after: int) -> float:
    """The exact two-sided p of McNemar's test, from the numbers of items that one of two models alone answered so.

    >>> mcnemar(0, 0), round(mcnemar(1, 9), 5)
    (1.0, 0.02148)
    """
    n = only_before + only_after
    return float(binomtest(only_before, n, 0.5).pvalue) if n else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of the p values of several tests, in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def difference_interval(p: float, n: int, q: float, m: int) -> Interval:
    """The interval of p - q, shares of n and of m independent items (Newcombe's unpaired, method 10).

    >>> [round(one, 3) for one in difference_interval(48 / 70, 70, 56 / 70, 70)]
    [-0.253, 0.031]
    """
    (low_p, high_p), (low_q, high_q) = wilson(p, n), wilson(q, m)
    rise = p - q
    return rise - math.hypot(p - low_p, high_q - q), rise + math.hypot(high_p - p, q - low_q)
