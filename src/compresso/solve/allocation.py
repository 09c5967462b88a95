"""One allocator for all methods: a name for each way to turn scores and a budget into a plan."""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.budget import Budget, removable
from compresso.core.plan import Plan
from compresso.core.quantities import Cost
from compresso.core.score import parameters_per_unit
from compresso.solve.allocate import allocate
from compresso.solve.per_layer import allocate_per_layer, equal_weights, sensitivity_weights

Allocation = Literal["global", "per_layer", "sensitivity", "exact"]
"""global: one pool of all layers. per_layer: every layer the same share. sensitivity: shares by what a layer's units
are worth. exact: the greatest sum of scores, by integer programming.
"""


def allocated(
    how: Allocation,
    axes: Sequence[Axis],
    scores: Mapping[str, Tensor],
    cost: Cost,
    budget: Budget,
    per_unit: bool = False,
) -> Plan:
    """The plan for scores and a budget, by the named way.

    Args:
        how: see `Allocation`.
        axes, scores, cost, budget: as `core.allocate.allocate` takes them.
        per_unit: whether scores are worth a unit; False where they are worth one of what the budget counts, so that
            "exact" multiplies by a unit's price.

    Raises:
        InfeasibleBudget: floors or multiples leave more than the target.
        ValueError: as the ways do.
    """
    if how == "global":
        return allocate(axes, scores, cost, budget)
    if how == "per_layer":
        return allocate_per_layer(axes, scores, cost, budget, equal_weights(axes, budget))
    if how == "sensitivity":
        return allocate_per_layer(axes, scores, cost, budget, sensitivity_weights(axes, scores, budget))
    from compresso.solve.exact import allocate_exactly  # scipy's solver takes a while to import

    prices = parameters_per_unit(removable(axes, budget), cost, budget.of)
    # what takes nothing of the count is worth its score, so that it stays
    worth = (
        scores if per_unit else {name: score * (prices[name] or 1) for name, score in scores.items() if name in prices}
    )
    return allocate_exactly(axes, worth, cost, budget)
