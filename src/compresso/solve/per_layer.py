"""Share a budget out over layers before any unit is compared: each layer keeps its own share, and its best units.

Where scores of different layers do not compare (magnitudes, gradients of different scale), a pool over all layers
empties some of them. Two ways to set the shares: all layers the same, or in proportion to how much a layer's units are
worth, within bounds. The second is ours; its bounds keep one loud layer from taking everything.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.budget import Budget, infeasible, removable
from compresso.core.plan import Plan
from compresso.core.quantities import Cost
from compresso.solve.allocate import keep_counts

BOUNDS = (0.5, 1.5)
"""Least and greatest share of a layer, relative to the budget's own."""


def equal_weights(axes: Sequence[Axis], budget: Budget) -> dict[str, float]:
    """Every layer the same share."""
    return {axis.name: 1.0 for axis in removable(axes, budget)}


def sensitivity_weights(axes: Sequence[Axis], scores: Mapping[str, Tensor], budget: Budget) -> dict[str, float]:
    """A layer's share grows with the square root of its units' mean score over that of all layers' units of the kind,
    within `BOUNDS`.

    Raises:
        ValueError: scores below zero, of which no layer could be called twice as sensitive as another.
    """
    pool = removable(axes, budget)
    for axis in pool:
        if float(scores[axis.name].min()) < 0:
            raise ValueError(f"scores of {axis.name} are below zero; shares by sensitivity need scores from 0 up")
    means = {axis.name: float(scores[axis.name].double().mean()) for axis in pool}
    weights: dict[str, float] = {}
    for axis in pool:
        others = [means[other.name] for other in pool if other.kind == axis.kind]
        overall = sum(others) / len(others)
        weights[axis.name] = min(max((means[axis.name] / overall) ** 0.5, BOUNDS[0]), BOUNDS[1]) if overall else 1.0
    return weights


def allocate_per_layer(
    axes: Sequence[Axis], scores: Mapping[str, Tensor], cost: Cost, budget: Budget, weights: Mapping[str, float]
) -> Plan:
    """The plan in which axis a keeps its best min(1, s * weights[a]) of its units, with the largest s that the budget
    allows.

    What rounding to whole units (or multiples) leaves over goes to the axes that lost most by it, one step each. Never
    above the budget.

    Args:
        axes, scores, cost, budget: as `allocate` takes them; `uniform_over` is met where all weights of a kind are
            equal.
        weights: axis name -> relative share, above 0.

    Raises:
        InfeasibleBudget: floors or multiples leave more than the target.
        ValueError: as `allocate` does.
    """
    pool = removable(axes, budget)
    limit = budget.limit(cost)
    allowed = {axis.name: budget.allowed(axis.kind, axis.size, budget.fewest(axis)) for axis in pool}

    def wanted(share: float) -> dict[str, float]:
        return {axis.name: min(1.0, share * weights[axis.name]) * axis.size for axis in pool}

    def counts(share: float) -> dict[str, int]:
        return {
            name: max([n for n in allowed[name] if n <= most + 1e-9], default=allowed[name][0])
            for name, most in wanted(share).items()
        }

    def fits(trial: Mapping[str, int]) -> bool:
        masks = {
            axis.name: (torch.arange(axis.size) < trial[axis.name]).double() for axis in pool
        }  # which units does not matter
        return float(cost(masks).count(budget.of)) <= limit

    if not fits(counts(0.0)):
        raise infeasible(budget, pool, cost, Plan({name: tuple(range(n)) for name, n in counts(0.0).items()}))
    low, high = 0.0, 1 / min(weights[axis.name] for axis in pool)
    if fits(counts(high)):
        return keep_counts(pool, scores, counts(high))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(counts(middle)) else (low, middle)
    kept, aim = counts(low), wanted(low)
    for name in sorted(kept, key=lambda name: kept[name] - aim[name]):
        above = [n for n in allowed[name] if n > kept[name]]
        if above and fits({**kept, name: above[0]}):
            kept[name] = above[0]
    return keep_counts(pool, scores, kept)
