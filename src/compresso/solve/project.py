"""Hold learned gates on a budget: during training by one shift of all gates, at the end by choosing exactly which units
stay.

Departures from Compresso (arXiv 2310.05015), which holds the size by a Lagrangian alone and rounds each layer by
itself: a Lagrangian run ends within a percent or two of its target, these functions on it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.budget import Budget, InfeasibleBudget, infeasible
from compresso.core.hard_concrete import (
    LOG_ALPHA_HIGH,
    LOG_ALPHA_LOW,
    expected_kept,
    keep_probability,
    removal_order,
    soft_value,
)
from compresso.core.plan import Plan
from compresso.core.quantities import Cost, CostName
from compresso.solve.greedy import Flat, Items, admit_greedily

_FAR = 40.0
"""A shift beyond which every gate is as closed or as open as its probability can be."""


def reachable(log_alpha: Mapping[str, Tensor], cost: Cost, of: CostName = "blocks") -> tuple[float, float]:
    """The least and the greatest expected share of the dense count that gates within the clamp's range can express.

    Gates never quite close or open: the range is about 0.002 to 0.996 where hidden dimensions and all blocks have
    gates. A target that starts at the dense model must be cut to it.
    """
    flat, dense = Flat(_gated(log_alpha, cost)), float(cost().count(of))
    ends = [
        float(cost(flat.split(_probability(torch.full((flat.units,), end)))).count(of))
        for end in (LOG_ALPHA_LOW, LOG_ALPHA_HIGH)
    ]
    return ends[0] / dense, ends[1] / dense


def shift_to_budget(log_alpha: Mapping[str, Tensor], cost: Cost, keep: float, of: CostName = "blocks") -> float:
    """The one number that, added to every log_alpha before the clamp, makes the expected count keep x dense, to 1e-9.

    The count is taken after the clamp to [ln 0.01, ln 100]: gates at its ends do not move, and the others make up for
    them. So `a.add_(shift)` and `clamp_(a)` for all gates end on the budget; where no gate is clamped the shift is the
    plain one.

    Args:
        log_alpha: axis name -> [size]; axes without gates are kept whole.
        cost: counts the model.
        keep: share of the dense count, in (0, 1].
        of: what is counted.

    Raises:
        InfeasibleBudget: the target lies outside of `reachable`.
        ValueError: NaN.
    """
    flat = Flat(_gated(log_alpha, cost))
    gates = torch.cat([log_alpha[name].detach() for name in flat.names]).double()
    # where they are: this runs after every update
    lowest, highest = (float(end) for end in torch.aminmax(gates))
    if not math.isfinite(lowest + highest):
        raise ValueError(
            "log_alpha holds NaN or infinity; the update before this one diverged: lower the gates' learning rate"
        )
    target = Budget(keep).keep * float(cost().count(of))
    # find s with  count(P(open | clamp(log_alpha + s))) = target; the count rises with s, so bisection finds it
    sizes = torch.tensor(flat.sizes, device=gates.device)
    by_totals = cost.tiled(flat.names)  # `unsafe` below: to look at the lengths would be to wait for the device

    def excess(shift: float) -> float:
        open_ = _probability(gates + shift)
        counted = (
            cost.of_totals(flat.names, torch.segment_reduce(open_, "sum", lengths=sizes, unsafe=True))
            if by_totals
            else cost(flat.split(open_))
        )
        return float(counted.count(of)) - target

    # Past these ends every gate is clamped.
    shift = _root(excess, LOG_ALPHA_LOW - highest, LOG_ALPHA_HIGH - lowest, accuracy=1e-10 * target)
    if shift is None:
        least, most = reachable(log_alpha, cost, of)
        raise InfeasibleBudget(
            f"keep={keep} of {of} is out of reach of these gates, which express {least:.7f} to {most:.7f}; cut it"
        )
    return shift


def deterministic_to_budget(
    log_alpha: Mapping[str, Tensor], axes: Sequence[Axis], cost: Cost, keep: float, of: CostName = "blocks"
) -> dict[str, Tensor]:
    """Evaluation masks whose kept units count keep x dense: never more, and less by under one smallest unit.

    Each axis keeps as many of its best gates as the deterministic rule (round(n - sum of keep probabilities) are
    removed) gives for log_alpha + s, with the largest s whose count is not above the target. Then gates that still fit
    come back, best first over all axes. Survivors carry the soft value of their own, unshifted log_alpha. Equal gates:
    the lowest index is removed first.

    Args:
        log_alpha: axis name -> [size]; axes without gates are kept whole and get no mask.
        axes: the model's axes.
        cost: counts the model.
        keep: share of the dense count, in (0, 1].
        of: what is counted.

    Returns masks by axis name, [size], in log_alpha's dtype and device.

    Raises:
        InfeasibleBudget: the axes' `min_units` leave more.
    """
    pool = [axis for axis in axes if axis.name in log_alpha and axis.size]
    budget = Budget(keep, of, kinds=tuple({axis.kind for axis in pool}))
    limit = budget.limit(cost)
    flat = Flat(pool)
    gates = flat.join(log_alpha)
    orders = [removal_order(part) for part in flat.split(gates).values()]

    def kept(shift: float) -> Tensor:
        """The units that the rule keeps at a shift [units], bool."""
        kept = torch.zeros(flat.units, dtype=torch.bool)
        shifted = flat.split(gates + shift)
        for axis, at, order in zip(pool, flat.starts, orders, strict=True):
            kept[at + order[axis.size - max(axis.fewest, expected_kept(shifted[axis.name])) :]] = True
        return kept

    def fits(units: Tensor) -> bool:
        return float(cost({name: mask.double() for name, mask in flat.split(units).items()}).count(of)) <= limit

    high = _FAR + float(gates.abs().max())
    low = -high
    if not fits(kept(low)):
        raise infeasible(budget, pool, cost, Plan.from_masks(pool, flat.split(kept(low))))
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(kept(middle)) else (low, middle)
    start = kept(low)

    open_units = (~start).nonzero().flatten()
    best_first = open_units[removal_order(gates[open_units]).flip(0)]
    of_unit = torch.full((flat.units,), -1).scatter_(0, best_first, torch.arange(len(best_first)))
    group = torch.cat([torch.full((axis.size,), i) for i, axis in enumerate(pool)])[best_first]
    tiled = torch.tensor([all(piece.unit is None for piece in axis.slices) for axis in pool])
    items = Items(of_unit, group, tiled[group])
    masks = flat.split(items.units(admit_greedily(items, lambda trial: fits(items.units(trial, start))), start))
    return {
        name: soft_value(log_alpha[name].detach()) * mask.to(device=log_alpha[name].device, dtype=log_alpha[name].dtype)
        for name, mask in masks.items()
    }


def _gated(log_alpha: Mapping[str, Tensor], cost: Cost) -> list[Axis]:
    """The axes that have gates. Raises ValueError for a name that the cost model does not know or no gates at all."""
    chosen = [axis for axis in cost.axes if axis.name in log_alpha]
    if len(chosen) != len(log_alpha) or not chosen:
        unknown = sorted(set(log_alpha) - {axis.name for axis in cost.axes})
        raise ValueError(f"log_alpha must name axes of the model and at least one; unknown: {unknown[:4]}")
    return chosen


def _probability(gates: Tensor) -> Tensor:
    """Keep probabilities of clamped gates [units], float64."""
    return keep_probability(gates.double().clamp(LOG_ALPHA_LOW, LOG_ALPHA_HIGH))


def _root(f: Callable[[float], float], low: float, high: float, accuracy: float) -> float | None:
    """Where a continuous, rising f is 0 in [low, high], to |f| <= accuracy; None if it does not come to 0 there.

    After an update the root is near 0, so it is first bracketed from there by growing steps, then found by the Illinois
    variant of false position: some eight evaluations in all, without derivatives.
    """
    a = min(max(0.0, low), high)
    fa = f(a)
    if abs(fa) <= accuracy:
        return a
    step = -0.03 if fa > 0 else 0.03
    b, fb = a, fa
    while fa * fb > 0:
        a, fa = b, fb
        b = min(max(a + step, low), high)
        if b == a:
            return None
        fb = f(b)
        if abs(fb) <= accuracy:
            return b
        step *= 4
    while abs(fb) > accuracy and abs(b - a) > 1e-15 * (1 + abs(b)):
        c = b - fb * (b - a) / (fb - fa)
        fc = f(c)
        if fc * fb < 0:
            a, fa = b, fb
        else:
            fa /= 2  # the same end twice: pull the next point towards the other end
        b, fb = c, fc
    return b
