"""A ratio of sums over independent examples, such as a loss a token or an F1, with its standard error."""

import math
import statistics
from collections.abc import Sequence


def ratio_error(above: Sequence[float], below: Sequence[float]) -> float | None:
    """Standard error of sum(above) / sum(below), by linearising it in the examples; None for a single example, or where
    nothing stands below.

    Args:
        above, below: of each example.

    >>> ratio_error([1, 0, 1, 0], [1, 1, 1, 1]) == statistics.stdev([1, 0, 1, 0]) / 2
    True
    """
    n, total = len(above), math.fsum(below)
    if n < 2 or not total:
        return None
    mean = math.fsum(above) / total
    residuals = [top - mean * bottom for top, bottom in zip(above, below, strict=True)]
    return statistics.stdev(residuals) * math.sqrt(n) / total
