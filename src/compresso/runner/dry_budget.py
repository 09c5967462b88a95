"""What a stage's budget leaves, of shapes alone: that it can be met is proved before weights are read."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, InfeasibleBudget, NoSuchUnits, Refused, Shortfall
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.errors import BudgetError
from compresso.solve.allocate import allocate
from compresso.solve.uniform import uneven, uniform_targets
from compresso.stage import PlansShapes, Shrinks


def gone(axes: Sequence[Axis], plan: Plan) -> list[Kind]:
    """The kinds of which a plan keeps no unit on any axis."""
    kinds = {axis.kind for axis in axes if axis.size}
    return sorted(kind for kind in kinds if not any(plan.kept.get(a.name, (0,)) for a in axes if a.kind == kind))


def emptied(
    name: str, axes: Sequence[Axis], cost: CostModel, budget: Budget, kinds: Sequence[Kind]
) -> InfeasibleBudget:
    """What is said where `{stage}` trains what a budget leaves nothing of, with what would leave some."""

    def leaves_some(one: Budget) -> bool:
        try:
            counted = uniform_targets(axes, cost, one)
        except ValueError:  # below what its floors and multiples allow
            return False
        return all(counted.get(kind, 1) for kind in kinds)

    low, high = budget.keep, 1.0
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if leaves_some(replace(budget, keep=middle)) else (middle, high)
    held = leaves_some(replace(budget, floor={**budget.floor, **dict.fromkeys(kinds, 1)}))
    floor = f", or set floor to {{{{{', '.join(f'{kind}: 1' for kind in kinds)}}}}}" if held else ""
    share, gone = math.ceil(high * 1e3) / 1e3, f"no {' and no '.join(kinds)}"
    uncured = f"keep={budget.keep:g} leaves {gone} in any layer, but stage '{{stage}}' trains what goes with it"
    return InfeasibleBudget(
        f"stage '{name}': {uncured}; raise keep to {share:g}{floor}",
        Shortfall(
            budget.keep,
            share,
            f"less leaves {gone} in any layer, and stage '{{stage}}' trains what goes with it",
            {f"floor.{kind}": 1 for kind in kinds},
        ),
        uncured=uncured,
    )


def untrainable(name: str, said: InfeasibleBudget, stage: str) -> BudgetError:
    """The error for a stage that trains what the budget of another, by name, leaves nothing of."""
    found = said.shortfall
    assert found is not None  # that is what `emptied` tells
    return BudgetError(
        str(said).format(stage=stage),
        replace(found, cause=found.cause.format(stage=stage)),
        Refused(name, said.uncured.format(stage=stage)),
    )


def _refused(name: str, error: ValueError, axes: Sequence[Axis], cost: CostModel, budget: Budget | None) -> BudgetError:
    """The error for a stage whose budget cannot be met, with what else the model has that could leave."""
    message = f"stage '{name}': {error}"
    if budget is None or not isinstance(error, InfeasibleBudget | NoSuchUnits) or not error.uncured:
        return BudgetError(message)
    dense, shares = float(cost().count(budget.of)), dict[Kind, float]()
    for kind in {axis.kind for axis in axes if axis.size} - {*budget.kinds, Kind.VOCAB}:  # tokens are no budget's
        leaving = [axis for axis in axes if axis.size and axis.kind in {*budget.kinds, kind}]
        masks = {axis.name: (torch.arange(axis.size) < axis.fewest).double() for axis in leaving}
        shares[kind] = float(cost(masks).count(budget.of)) / dense
    there = tuple(kind for kind in budget.kinds if any(axis.kind == kind for axis in axes if axis.size))
    return BudgetError(message, refused=Refused(name, error.uncured, there, shares))


def _alike(axes: Sequence[Axis]) -> dict[str, Tensor]:
    """Scores of units that are all alike; in stages of different widths, such that each gives the same share."""
    if uneven(axes) is None:
        return {axis.name: torch.zeros(axis.size) for axis in axes}
    return {axis.name: 1 - torch.arange(axis.size) / max(axis.size, 1) for axis in axes}


def dry_run_plan(name: str, axes: tuple[Axis, ...], cost: CostModel, stage: Shrinks) -> tuple[Budget | None, Plan]:
    """A stage's budget, and a plan within it for units that are all alike: proves that it can be met and shows its
    shapes.

    The plan is the stage's own where a budget does not describe its choice (`PlansShapes`). Its budget may be None.

    Raises:
        BudgetError: if it cannot, with the floor or multiple that stands in the way.
    """
    budget = None
    try:
        budget = stage.budget()
        if isinstance(stage, PlansShapes):
            return budget, stage.dry_run_plan(axes, cost)
    except ValueError as error:
        raise _refused(name, error, axes, cost, budget) from error
    assert budget is not None  # only stages that dry_run_plan go without
    try:
        counted = uniform_targets(axes, cost, budget)
        return budget, Plan(
            {axis.name: tuple(range(counted[axis.kind])) for axis in axes if axis.kind in counted and axis.size}
        )
    except ValueError as first:
        if budget.uniform_over:
            raise _refused(name, first, axes, cost, budget) from first
        try:
            return budget, allocate(axes, _alike(axes), cost, budget)
        except ValueError as error:
            raise _refused(name, error, axes, cost, budget) from error
