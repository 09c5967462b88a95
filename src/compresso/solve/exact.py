"""The best plan within a budget, by integer programming instead of greedily: which units to keep so that their scores
sum to the most.

    maximise  sum of scores of kept units    subject to    sum of their prices <= what the budget leaves,  floors and
              multiples per axis

A knapsack (scipy's `milp`, HiGHS). It is exact where a unit's price does not depend on which others are kept: heads and
channels of a model whose hidden width is not changed. Units of one axis have one price, so that an axis keeps its best
units in any optimum. Where the price of a unit depends on how many of its axis stay (a table of latencies), each axis
chooses one of its allowed counts; see `compresso.solve.levels`.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, infeasible, removable
from compresso.core.plan import Plan
from compresso.core.quantities import Cost
from compresso.core.score import parameters_per_unit
from compresso.solve.allocate import keep_counts
from compresso.solve.levels import GAP, SECONDS, choose_levels

ADDITIVE = (Kind.HEAD, Kind.CHANNEL)
"""Kinds whose prices add up."""


def allocate_exactly(axes: Sequence[Axis], scores: Mapping[str, Tensor], cost: Cost, budget: Budget) -> Plan:
    """The plan with the greatest sum of scores within the budget, to a relative gap of 1e-4.

    Args:
        axes, cost, budget: as `allocate` takes them; only heads and channels, no `uniform_over`.
        scores: axis name -> [size], what a kept unit is worth: a sum is maximised, so scores are per unit, not per
            parameter.

    Raises:
        InfeasibleBudget: floors or multiples leave more than the target.
        ValueError: kinds whose prices do not add up, for equal widths, and if the solver finds no plan in time.
    """
    if odd := [kind for kind in budget.kinds if kind not in ADDITIVE]:
        raise ValueError(
            f"allocation 'exact' counts heads and channels; the price of a unit of kind '{odd[0]}' depends on the"
            " others"
        )
    if budget.uniform_over:
        raise ValueError(
            "allocation 'exact' chooses each layer's width; for equal widths take allocation 'global' with layout"
            " 'uniform'"
        )
    pool = removable(axes, budget)
    least = {axis.name: budget.allowed(axis.kind, axis.size, budget.fewest(axis))[0] for axis in pool}
    floor_plan = Plan({name: tuple(range(n)) for name, n in least.items()})
    if float(cost.of(floor_plan).count(budget.of)) > budget.limit(cost):
        raise infeasible(budget, pool, cost, floor_plan)
    if not cost.even(budget.of):
        return keep_counts(pool, scores, _counts_by_level(pool, scores, cost, budget))
    price_of = parameters_per_unit(pool, cost, budget.of)
    # from the dense count downwards, so that what leaves with an axis' last unit counts as staying
    removed = sum(price_of[axis.name] * (axis.size - least[axis.name]) for axis in pool)
    capacity = max(budget.limit(cost) - (float(cost().count(budget.of)) - removed), 0.0)
    values: list[float] = []
    prices: list[float] = []
    steps: list[tuple[str, int]] = []  # the axis and how many units each step adds
    chains: list[tuple[int, int]] = []  # a step needs the one before it
    for axis in pool:
        ranked = scores[axis.name].detach().double().cpu().sort(descending=True).values
        allowed = budget.allowed(axis.kind, axis.size, least[axis.name])
        uneven = len({more - fewer for fewer, more in itertools.pairwise(allowed)}) > 1
        for index, (fewer, more) in enumerate(itertools.pairwise(allowed)):
            if index and uneven:
                chains.append((len(values) - 1, len(values)))  # or a shorter last step would be taken out of turn
            values.append(float(ranked[fewer:more].sum()))
            prices.append(price_of[axis.name] * (more - fewer))
            steps.append((axis.name, more - fewer))
    kept = dict(least)
    for chosen, (name, units) in zip(_solved(values, prices, capacity, chains), steps, strict=True):
        kept[name] += units * chosen
    return keep_counts(pool, scores, kept)


def _counts_by_level(pool: Sequence[Axis], scores: Mapping[str, Tensor], cost: Cost, budget: Budget) -> dict[str, int]:
    """How many units each axis keeps, where prices are those of counts."""
    allowed = {axis.name: budget.allowed(axis.kind, axis.size, budget.fewest(axis)) for axis in pool}
    dense = float(cost().count(budget.of))
    worths: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    for axis in pool:
        ranked = scores[axis.name].detach().double().cpu().sort(descending=True).values
        worths[axis.name] = [float(ranked[:n].sum()) for n in allowed[axis.name]]
        masks = [(torch.arange(axis.size) < n).double() for n in allowed[axis.name]]  # which units does not matter
        costs[axis.name] = [float(cost({axis.name: mask}).count(budget.of)) - dense for mask in masks]
    levels = choose_levels(worths, costs, budget.limit(cost) - dense)
    return {name: allowed[name][level] for name, level in levels.items()}


def _solved(
    values: Sequence[float], prices: Sequence[float], capacity: float, chains: Sequence[tuple[int, int]]
) -> list[int]:
    """0 or 1 for each step. Raises ValueError if the solver has no answer."""
    n = len(values)
    if not n:
        return []
    scale = max(max(abs(value) for value in values), 1e-300)
    rows = [0] * n + [row for row in range(1, len(chains) + 1) for _ in (0, 1)]
    columns = [*range(n), *(column for pair in chains for column in pair)]
    entries = [price / max(capacity, 1.0) for price in prices] + [sign for _ in chains for sign in (-1.0, 1.0)]
    matrix = csr_array((entries, (rows, columns)), shape=(1 + len(chains), n))
    upper = np.array([capacity / max(capacity, 1.0)] + [0.0] * len(chains))
    answer = milp(
        [-value / scale for value in values],
        constraints=LinearConstraint(matrix, ub=upper),  # pyright: ignore[reportArgumentType]
        bounds=Bounds(0, 1),
        integrality=np.ones(n),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if answer.x is None or answer.status != 0:
        raise ValueError(
            f"the exact allocation of {n:,} steps was not solved in {SECONDS:.0f} s ({answer.message}); take allocation"
            " 'global'"
        )
    return [round(float(value)) for value in answer.x]
