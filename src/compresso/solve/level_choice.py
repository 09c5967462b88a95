"""One level for each item so that errors add up to the least within a budget: exact, by dynamic programming.

    minimise  sum of errors of the chosen levels    subject to    sum of their costs <= limit,  one level an item

An item is whatever comes in versions of different cost: a sub-layer with fewer and fewer heads or channels and gone at
last, a block at several shares of zeros. Costs may be parameters, bytes or milliseconds, on any scale.

The table runs over whole steps of cost above the cheapest levels. Where costs have a common measure that divides the
budget into at most `STEPS` steps, that is the step, and the choice is the optimum. Elsewhere the step is coarser and
costs are rounded up to it, so that what the table thinks fits does fit; nothing cheaper than the limit by a step an
item has a smaller error, and what rounding left over is spent one item at a time. Either way the costs of the chosen
levels are added up exactly at the end.

`compresso.solve.levels` answers the same question by integer programming to a gap of 1e-4, where costs have no small
common measure and there are many items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from compresso.core.budget import InfeasibleBudget

STEPS = 50_000
"""Most steps of cost in the table: of each item it holds one byte or two a step."""

Levels = tuple[int, ...]
"""The level of each item, in the order of items."""


@dataclass(frozen=True)
class Item:
    """Something that comes in levels.

    Args:
        name: of it, for messages and records.
        costs: what each level costs.
        errors: what each level is feared to do to the model, lower is better; infinite forbids a level. Empty where a
            search asks the model instead.

    Raises:
        ValueError: no level, not as many errors as costs, a cost that is not finite, or an error that is no number.
    """

    name: str
    costs: tuple[float, ...]
    errors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be chosen among."""
        if not self.costs or len(self.errors) not in (0, len(self.costs)):
            raise ValueError(
                f"{self.name} has {len(self.costs)} costs and {len(self.errors)} errors; wanted one of each for every"
                " level"
            )
        if not all(math.isfinite(cost) for cost in self.costs) or any(math.isnan(error) for error in self.errors):
            raise ValueError(f"{self.name} has a cost that is not finite or an error that is no number; measure anew")


@dataclass(frozen=True)
class Choice:
    """What the table chose.

    Args:
        levels: one of each item.
        cost: of these levels, added up exactly; never above the limit.
        error: sum of their errors.
        resolution: cost of a step of the table.
        exact: whether every cost is a whole number of steps, so that no other choice within the limit has a smaller
            error.
    """

    levels: Levels
    cost: float
    error: float
    resolution: float
    exact: bool


def choose_exactly(items: Sequence[Item], limit: float, resolution: float | None = None) -> Choice:
    """The levels with the least sum of errors whose costs are within the limit.

    Of equal sums the one with the lowest levels is taken, earlier items first.

    Args:
        items: with errors.
        limit: what all levels together may cost.
        resolution: cost of a step; None finds one, as the header says.

    Raises:
        InfeasibleBudget: the cheapest levels cost more, or no level that is not forbidden fits.
        ValueError: an item has no errors, or a resolution that is not above zero.
    """
    if bare := [item.name for item in items if not item.errors]:
        raise ValueError(f"{bare[0]} has no errors to choose by; measure each of its levels")
    if resolution is not None and not resolution > 0:
        raise ValueError(f"resolution={resolution} is no step; give a cost above 0, or None")
    spare = Fraction(limit) - cost_floor(items, limit)
    extras = [[Fraction(cost) - Fraction(min(item.costs)) for cost in item.costs] for item in items]
    spare = min(spare, sum((max(extra) for extra in extras), Fraction(0)))
    step = _step(extras, spare) if resolution is None else Fraction(resolution)
    weights = [[math.ceil(extra / step) for extra in of_item] for of_item in extras]
    rounded = [weight * step for of_item in weights for weight in of_item]
    exact = rounded == [extra for of_item in extras for extra in of_item]
    levels = _by_table(items, weights, spare // step)
    if not exact:
        levels = _spend(items, levels, limit)
    error = _error(items, levels)
    if math.isinf(error):
        raise InfeasibleBudget(f"no levels with finite errors fit within {limit:.6g}; raise keep, or allow more levels")
    return Choice(levels, cost_of(items, levels), error, float(step), exact)


def cost_of(items: Sequence[Item], levels: Levels) -> float:
    """What the levels cost together, rounded once; `fits` decides without rounding."""
    return float(_exact_cost(items, levels))


def fits(items: Sequence[Item], levels: Levels, limit: float) -> bool:
    """Whether the levels cost no more than the limit, without a rounding error."""
    return _exact_cost(items, levels) <= Fraction(limit)


def whole_costs(items: Sequence[Item], limit: float) -> tuple[list[list[int]], int]:
    """The costs of each item's levels and the limit as whole numbers of one unit, so that sums are exact and quick."""
    below = math.lcm(*(Fraction(cost).denominator for item in items for cost in item.costs))
    costs = [[int(Fraction(cost) * below) for cost in item.costs] for item in items]
    return costs, math.floor(Fraction(limit) * below)


def cost_floor(items: Sequence[Item], limit: float) -> Fraction:
    """What the cheapest levels cost together.

    Raises:
        InfeasibleBudget: they cost more than the limit.
    """
    floor = sum((Fraction(min(item.costs)) for item in items), Fraction(0))
    if floor > Fraction(limit):
        raise InfeasibleBudget(
            f"the cheapest levels cost {float(floor):.6g}, more than {limit:.6g}; raise keep, or add cheaper levels"
        )
    return floor


def _exact_cost(items: Sequence[Item], levels: Levels) -> Fraction:
    return sum((Fraction(item.costs[level]) for item, level in zip(items, levels, strict=True)), Fraction(0))


def _error(items: Sequence[Item], levels: Levels) -> float:
    """Sum of errors, last item first, as the table adds them."""
    total = 0.0
    for item, level in zip(reversed(items), reversed(levels), strict=True):
        total = item.errors[level] + total
    return total


def _step(extras: Sequence[Sequence[Fraction]], spare: Fraction) -> Fraction:
    """The greatest common measure of all costs, or what divides the budget into `STEPS` steps where that is finer."""
    given = [extra for of_item in extras for extra in of_item if extra]
    if not given:
        return Fraction(1)
    below = math.lcm(*(extra.denominator for extra in given))
    common = Fraction(math.gcd(*(int(extra * below) for extra in given)), below)
    return common if spare / common <= STEPS else spare / STEPS


def _by_table(items: Sequence[Item], weights: Sequence[Sequence[int]], capacity: int) -> Levels:
    """The levels of least error whose weights are within the capacity, in whole steps."""
    best = np.zeros(capacity + 1)
    taken: list[np.ndarray] = []
    for item, of_item in zip(reversed(items), reversed(weights), strict=True):
        found = np.full(capacity + 1, np.inf)
        level_at = np.zeros(capacity + 1, dtype=np.int16)
        level_at[:] = of_item.index(0)  # the cheapest always fits, though it may be forbidden
        for level, (weight, error) in enumerate(zip(of_item, item.errors, strict=True)):
            if weight > capacity:
                continue
            with_it = error + best[: capacity + 1 - weight]
            better = with_it < found[weight:]
            found[weight:][better] = with_it[better]
            level_at[weight:][better] = level
        best = found
        taken.append(level_at)
    left, levels = capacity, list[int]()
    for level_at, of_item in zip(reversed(taken), weights, strict=True):
        levels.append(int(level_at[left]))
        left -= of_item[levels[-1]]
    return tuple(levels)


def _spend(items: Sequence[Item], levels: Levels, limit: float) -> Levels:
    """What rounding left over is spent: the change of one item that saves most error and fits, again and again."""
    costs, most = whole_costs(items, limit)
    chosen = list(levels)
    while True:
        left = most - sum(of_item[level] for of_item, level in zip(costs, chosen, strict=True))
        best, gain = None, 0.0
        for place, item in enumerate(items):
            now = chosen[place]
            for level, error in enumerate(item.errors):
                if item.errors[now] - error > gain and costs[place][level] - costs[place][now] <= left:
                    best, gain = (place, level), item.errors[now] - error
        if best is None:
            return tuple(chosen)
        chosen[best[0]] = best[1]
