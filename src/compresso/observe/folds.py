"""Statistics that are folded over rows of values as these appear, so that no pass keeps the values themselves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Fold = Callable[[Tensor | None, Tensor], Tensor]
"""A statistic: what it is so far (None at first) and rows of values [n, width] -> what it is then.

It may change what it is so far in place; it may not keep the rows.
"""


@dataclass
class Stats:
    """A statistic, and how many rows (tokens, or examples) it is of."""

    total: Tensor
    n: int


def sums(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: sum of each value [width], float64."""
    return _added(total, rows.double().sum(dim=0))


def absolute_sums(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: sum of the absolute of each value [width], float64."""
    return _added(total, rows.abs().double().sum(dim=0))


def moments(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: sum of each value, and sum of its squares [2, width], float64."""
    wide = rows.double()
    return _added(total, torch.stack([wide.sum(dim=0), wide.square().sum(dim=0)]))


def known_sums(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold over values that may be NaN, which are left out: of each, the sum, how many were known and how many were
    left out [3, width], float64.
    """
    columns = [column[~column.isnan()].double() for column in rows.T]
    found = torch.tensor(
        [
            [float(known.sum()) for known in columns],
            [len(known) for known in columns],
            [len(rows) - len(known) for known in columns],
        ],
        dtype=torch.float64,
    )
    return _added(total, found)


def squares(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: sum of squares of each value [width], in the rows' dtype."""
    return _added(total, rows.square().sum(dim=0))


def second_moment(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: sum of x x^T [width, width], in the rows' dtype. It is symmetric: products of the upper half are computed,
    in stripes, and mirrored.
    """
    size = rows.shape[1]
    found = rows.new_zeros(size, size) if total is None else total
    stripe = max(_STRIPE, -(-size // 8))
    for begin in range(0, size, stripe):
        end = min(begin + stripe, size)
        found[begin:end, begin:].addmm_(rows[:, begin:end].T, rows[:, begin:])
        square = found[begin:end, begin:end]
        square.copy_(
            square.triu() + square.triu(1).T
        )  # a product of a matrix with itself need not be symmetric to the last bit
        found[end:, begin:end] = found[begin:end, end:].T
    return found


_STRIPE = 128
"""Columns of a second moment from which on a product is worth a call of its own."""


def _added(total: Tensor | None, found: Tensor) -> Tensor:
    return found if total is None else total.add_(found)
