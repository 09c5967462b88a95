"""Statistics that are folded over rows of values as these appear, so that no pass keeps the values themselves.

A fold whose statistic of all rows follows from those of shares of them says so with `across`; several processes then
take a share each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from compresso.training.ranks import Across, Ranks

Fold = Callable[[Tensor | None, Tensor], Tensor]
"""A statistic: what it is so far (None at first) and rows of values [n, width] -> what it is then.

It may change what it is so far in place; it may not keep the rows.
"""
_Fold = TypeVar("_Fold", bound=Fold)
_ACROSS = "compresso_across"


@dataclass
class Stats:
    """A statistic, and how many rows (tokens, or examples) it is of."""

    total: Tensor
    n: int


def across(how: Across) -> Callable[[_Fold], _Fold]:
    """Decorator of a fold: the statistic of all rows is the sum, or the maximum, of those of any shares of them."""

    def marked(fold: _Fold) -> _Fold:
        setattr(fold, _ACROSS, how)
        return fold

    return marked


def across_of(fold: Fold) -> Across | None:
    """What a fold says; None if it says nothing, and only a single process may fold it."""
    return cast(Across | None, getattr(fold, _ACROSS, None))


def merge_(seen: dict[str, Stats], fold: Fold | Mapping[str, Fold], ranks: Ranks) -> None:
    """Put the statistics over all processes in the place of those over this one's share of the rows.

    A name that some processes have not seen is added where it lacks.

    Args:
        seen: by name.
        fold: of all of them, or one by name; each says `across`.
        ranks: the processes; all of them call this.
    """
    if ranks.n == 1:
        return
    have = ranks.told(
        {name: (one.n, one.total.shape, one.total.dtype, one.total.device.type) for name, one in seen.items()}
    )
    for name in sorted(set[str]().union(*have)):
        how = across_of(fold[name] if isinstance(fold, Mapping) else fold)
        assert how is not None, "several processes share only folds that say `across`"
        if name not in seen:
            _, shape, dtype, device = next(one[name] for one in have if name in one)
            seen[name] = Stats(torch.full(shape, 0 if how == "sum" else -torch.inf, dtype=dtype, device=device), 0)
        ranks.added_(seen[name].total, how)
        seen[name].n = sum(one[name][0] for one in have if name in one)


@across("sum")
def sums(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: sum of each value [width], float64."""
    return _added(total, rows.double().sum(dim=0))


@across("sum")
def absolute_sums(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: sum of the absolute of each value [width], float64."""
    return _added(total, rows.abs().double().sum(dim=0))


@across("sum")
def moments(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: sum of each value, and sum of its squares [2, width], float64."""
    wide = rows.double()
    return _added(total, torch.stack([wide.sum(dim=0), wide.square().sum(dim=0)]))


@across("sum")
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


@across("sum")
def squares(total: Tensor | None, rows: Tensor) -> Tensor:
    """Fold: sum of squares of each value [width], in the rows' dtype."""
    return _added(total, rows.square().sum(dim=0))


@across("sum")
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
