"""Several shapes of one size: how many units of each kind every layer keeps, from many of one kind to many of another.

What Minitron (arXiv 2407.14679, section 2.4) enumerates on a grid written by hand, computed from a budget instead.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import product

import torch

from compresso.core.axis import Axis, Kind
from compresso.core.budget import TOLERANCE, Budget, removable
from compresso.core.quantities import Cost
from compresso.solve.uniform import uniform_targets

GRID = 6
"""Counts of a kind that are tried, evenly spaced over those that can meet the budget."""
BELOW = 0.05
"""How far below the target a shape may lie, as a share of it: the paper's range."""


def candidate_shapes(axes: Sequence[Axis], cost: Cost, budget: Budget, most: int) -> list[dict[Kind, int]]:
    """At most `most` shapes within the budget, the first being that of `uniform_targets`, the others the further from
    it the later.

    Of the finest kind each keeps as many units as fit, at most 5 % below the target; above it, by up to 0.5 %, only
    where the budget has multiples.

    Raises:
        InfeasibleBudget: as `allocate` does.
        ValueError: unless most >= 1.
    """
    if most < 1:
        raise ValueError(f"{most} candidates; wanted at least 1")
    even = uniform_targets(axes, cost, budget)
    pool = removable(axes, budget)
    of_kind = {kind: [axis for axis in pool if axis.kind == kind] for kind in even}
    sizes = {kind: min(axis.size for axis in members) for kind, members in of_kind.items()}
    allowed = {
        kind: budget.allowed(kind, sizes[kind], max(min(sizes[kind], budget.fewest(axis)) for axis in members))
        for kind, members in of_kind.items()
    }
    limit = budget.limit(cost)

    def excess(counts: Mapping[Kind, int]) -> float:
        """How far above the target the model is whose axes keep these many units each."""
        masks = {
            axis.name: torch.full((axis.size,), counts[axis.kind] / axis.size, dtype=torch.float64) for axis in pool
        }
        return budget.settled(cost(masks).count(budget.of)) - limit

    finest = max(allowed, key=lambda kind: len(allowed[kind]))
    coarse = [kind for kind in allowed if kind != finest]
    found: list[dict[Kind, int]] = [even]
    everything = {kind: values[-1] for kind, values in allowed.items()}
    large_enough = {
        kind: [n for n in allowed[kind] if excess({**everything, kind: n}) >= -BELOW * limit] for kind in coarse
    }
    for picked in product(*(_spread(large_enough[kind]) for kind in coarse)):
        fixed = dict(zip(coarse, picked, strict=True))
        above = bisect_right(allowed[finest], 0, key=lambda n, fixed=fixed: excess({**fixed, finest: n}))
        for n in allowed[finest][max(above - 1, 0) : above + 1]:
            counts = {kind: fixed.get(kind, n) for kind in even}
            miss = excess(counts)
            if -BELOW * limit <= miss <= (TOLERANCE * limit if budget.rounds else 0) and counts not in found:
                found.append(counts)
    return sorted(found, key=lambda counts: max(abs(counts[kind] - even[kind]) / sizes[kind] for kind in even))[:most]


def _spread(values: Sequence[int]) -> list[int]:
    """At most GRID of the values, evenly spaced, both ends among them."""
    n = min(GRID, len(values))
    return [values[round(i * (len(values) - 1) / max(n - 1, 1))] for i in range(n)]
