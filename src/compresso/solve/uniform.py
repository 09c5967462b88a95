"""One width for all layers: how many units of each kind every layer keeps when a plain config must describe the result.

The targets that LLM-Shearing (arXiv 2310.06694) asks its user for, computed from a budget instead.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch

from compresso.core.axis import Axis, Kind
from compresso.core.budget import TOLERANCE, Budget, InfeasibleBudget, infeasible, removable
from compresso.core.quantities import Cost
from compresso.solve.allocate import keep_best


def uniform_targets(axes: Sequence[Axis], cost: Cost, budget: Budget) -> dict[Kind, int]:
    """One kept count for each of the budget's kinds, the same in every layer, near one common share and on the budget.

    All kinds but the finest take an allowed count beside the share at which fractional counts would meet the budget;
    the finest then takes the count that lands on it: the largest that is not above the target or, with multiples, the
    nearest. Among the choices within 0.5 % of the target the one nearest to the common share wins. Raises
    InfeasibleBudget as `allocate` does, and where stages have layers of different widths, which have no count in
    common.
    """
    pool = removable(axes, budget)
    if (kind := uneven(pool)) is not None:
        sizes = sorted(axis.size for axis in pool if axis.kind == kind)
        raise InfeasibleBudget(
            f"this model's stages have {sizes[0]} to {sizes[-1]} {kind} units a layer, and no one count fits all; take"
            " the stage filter_pruning, which keeps a share of each, or let a stage that scores keep other counts in"
            " each layer (layout: free, under --layout native)"
        )
    of_kind = {kind: [axis for axis in pool if axis.kind == kind] for kind in budget.kinds}
    of_kind = {kind: members for kind, members in of_kind.items() if members}
    sizes = {kind: min(axis.size for axis in members) for kind, members in of_kind.items()}
    allowed = {
        kind: budget.allowed(kind, sizes[kind], max(min(sizes[kind], budget.fewest(axis)) for axis in members))
        for kind, members in of_kind.items()
    }
    limit = budget.limit(cost)

    def excess(counts: Mapping[Kind, float]) -> float:
        """How far above the target the model is whose axes keep these many units each, whichever they are."""
        masks = {
            axis.name: torch.full((axis.size,), counts[axis.kind] / axis.size, dtype=torch.float64) for axis in pool
        }
        return budget.settled(cost(masks).count(budget.of)) - limit

    def at(share: float) -> dict[Kind, float]:
        return {kind: max(share * size, allowed[kind][0]) for kind, size in sizes.items()}

    if excess(at(0)) > (limit * TOLERANCE if budget.rounds else 0):
        nothing = {axis.name: torch.zeros(axis.size) for axis in pool}
        raise infeasible(budget, pool, cost, keep_best(pool, nothing, {kind: allowed[kind][0] for kind in sizes}))
    wanted = at(_largest_share(lambda share: excess(at(share))))

    def price(kind: Kind) -> float:
        """What one allowed step of a kind changes, on average; more than all else where there is no step."""
        steps = len(allowed[kind]) - 1
        return (
            (excess({**wanted, kind: allowed[kind][-1]}) - excess({**wanted, kind: allowed[kind][0]})) / steps
            if steps
            else math.inf
        )

    finest = min(sizes, key=price)
    coarse = [kind for kind in sizes if kind != finest]
    choices: list[tuple[tuple[float, float, float], dict[Kind, int]]] = []
    for picked in product(*(_beside(allowed[kind], wanted[kind]) for kind in coarse)):
        counts = dict(zip(coarse, picked, strict=True))
        first_above = bisect_right(allowed[finest], 0, key=lambda n, counts=counts: excess({**counts, finest: n}))
        for n in allowed[finest][max(first_above - 1, 0) : first_above + 1]:
            candidate = {kind: counts.get(kind, n) for kind in sizes}
            miss = excess(candidate)
            if miss <= 0 or budget.rounds:
                drift = max(abs(candidate[kind] - wanted[kind]) / sizes[kind] for kind in sizes)
                choices.append(((max(abs(miss) - TOLERANCE * limit, 0.0), drift, abs(miss)), candidate))
    return min(choices, key=lambda choice: choice[0])[1]


def uneven(axes: Sequence[Axis]) -> Kind | None:
    """A kind whose axes lie in stages of different widths, which are no layers of one list; None if there is none."""
    for kind in dict.fromkeys(axis.kind for axis in axes):
        in_stages = {axis.size for axis in axes if axis.kind == kind and axis.layer is None}
        if kind not in (Kind.LAYER, Kind.ATTENTION, Kind.MLP) and len(in_stages) > 1:
            return kind
    return None


def _largest_share(excess: Callable[[float], float]) -> float:
    """The largest share in [0, 1] whose excess is not above 0, to 50 bits; 0 if there is none."""
    if excess(1.0) <= 0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
    return low


def _beside(allowed: Sequence[int], wanted: float) -> list[int]:
    """The allowed counts next to a wanted one: one if it is allowed itself, else the one below and the one above."""
    below, above = bisect_right(allowed, wanted) - 1, bisect_left(allowed, wanted)
    return sorted({allowed[max(below, 0)], allowed[above]})
