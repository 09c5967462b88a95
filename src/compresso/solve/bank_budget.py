"""Budgets and a bank: whether one can be met before there is a bank, and what no choice of levels may leave."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, InfeasibleBudget, removable
from compresso.core.plan import Plan
from compresso.core.quantities import Cost
from compresso.solve.allocate import allocate
from compresso.solve.bank_choice import Menu
from compresso.solve.evolve import Fitness
from compresso.solve.level_choice import Levels

DEPTHS = (Kind.ATTENTION, Kind.MLP)
"""What leaves of a bank as a whole."""
WIDTHS = (Kind.HEAD, Kind.QUERY, Kind.CHANNEL)
"""What leaves of it unit by unit."""


def refuse_other_kinds(kinds: Sequence[Kind]) -> None:
    """Refuse what no bank holds. Raises ValueError."""
    known = (*DEPTHS, *WIDTHS)
    if not kinds or not set(kinds) <= set(known):
        raise ValueError(
            f"kinds={[*map(str, kinds)]}: a bank holds {', '.join(known)}; give some of them. A layer leaves"
            " where its attention and its mlp do"
        )


def plan_of_alike(axes: Sequence[Axis], cost: Cost, budget: Budget) -> Plan:
    """A plan within a budget for units that are all alike: widths, or whole parts where widths cannot meet it.

    Args:
        axes: of the model.
        cost: of it.
        budget: over kinds that a bank holds.

    Raises:
        ValueError: there are no such units.
        InfeasibleBudget: there is no such plan; it names the floor.
    """
    removable(axes, budget)
    whole = [kind for kind in budget.kinds if kind in DEPTHS]
    for kinds in ([kind for kind in budget.kinds if kind in (Kind.HEAD, Kind.CHANNEL)], whole):
        there = [axis for axis in axes if axis.kind in kinds and axis.size]
        if there:
            even = [kind for kind in budget.uniform_over if kind in kinds]
            try:
                zeros = {axis.name: torch.zeros(axis.size) for axis in there}
                return allocate(there, zeros, cost, replace(budget, kinds=kinds, uniform_over=even))
            except InfeasibleBudget:
                if kinds is whole or not whole:
                    raise
    raise ValueError("kinds names query alone; name head, too")


def keeping_fewest(fitness: Fitness, choice: Menu, axes: Sequence[Axis]) -> Fitness:
    """The fitness, infinite for candidates that keep too few parts; the model is not asked about these."""

    def held(levels: Levels, stage: int, /) -> float:
        try:
            choice.plan(levels, layers=False).check(axes)
        except ValueError:
            return math.inf
        return fitness(levels, stage) if len(choice.empty_blocks(levels)) < choice.bank.layers else math.inf

    return held
