"""Turn scores into a plan that meets a budget: one pool of all units of all layers, lowest scores removed first.

Unusual: Never above the target: removal goes on until the count is at or below it; then every removed unit that still
    fits comes back, best first. So the result ends less than one smallest unit below the target, though heads, channels
    and hidden dimensions share parameters and a unit's price depends on what else is removed. With multiples, a
    multiple of units is one item, worth the mean score of its units; kept units of an axis are always its best. The
    result is the allowed shape found from below, or that and one more multiple (the one that overshoots least) where it
    lands nearer. A refused coarse step (hidden multiples, a head in every layer) may strand the count over 0.5 % below;
    `_land` then looks around it. Ties go by axis order, then index, lowest removed first. All of it runs in float64 on
    the CPU, so that devices agree.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.budget import TOLERANCE, Budget, InfeasibleBudget, infeasible, removable
from compresso.core.hard_concrete import removal_order
from compresso.core.plan import Plan
from compresso.core.quantities import Cost
from compresso.solve.greedy import Flat, Items, admit_greedily

__all__ = ["Budget", "InfeasibleBudget", "allocate", "keep_best", "keep_counts"]


def allocate(
    axes: Sequence[Axis],
    scores: Mapping[str, Tensor],
    cost: Cost,
    budget: Budget,
    removed: Mapping[str, Tensor] | None = None,
) -> Plan:
    """The plan that keeps the best units within a budget; it names every axis of the budget's kinds.

    Args:
        axes: the axes of the model, or those that may be touched.
        scores: axis name -> [size]; higher is kept; comparable across axes. Needed for every axis of the budget's
            kinds, others are ignored.
        cost: counts the model.
        budget: what may be kept. With `uniform_over`, rank r of a kind is one item: the r-th best unit of each layer,
            worth their mean score; so is rank r of the axes within the units of one other.
        removed: axis name -> [size], bool: units that were removed under an earlier, larger budget of the same shapes
            and do not come back.

    Raises:
        ValueError: missing, wrong-shaped or non-finite scores.
        InfeasibleBudget: floors or multiples leave more than the target (with multiples: by more than 0.5 % of it).
    """
    pool = removable(axes, budget)
    for axis in pool:
        _check_scores(axis, scores)
    flat = Flat(pool)
    start, items = _items(pool, scores, flat, budget, removed or {})
    limit = budget.limit(cost)

    def excess(units: Tensor) -> float:
        """How far above the target the model is that keeps these units [units], bool."""
        return float(cost({name: mask.double() for name, mask in flat.split(units).items()}).count(budget.of)) - limit

    if excess(start) > (limit * TOLERANCE if budget.rounds else 0):
        raise infeasible(budget, pool, cost, Plan.from_masks(pool, flat.split(start)))
    units = start
    if excess(start) <= 0:
        units = items.units(
            _land(items, lambda these: excess(items.units(these, start)), limit * TOLERANCE, budget.rounds), start
        )
    return Plan.from_masks(pool, flat.split(units))


def keep_best(axes: Sequence[Axis], scores: Mapping[str, Tensor], counts: Mapping[Kind, int]) -> Plan:
    """The plan that keeps, in every axis of the kinds named, that many units with the highest scores.

    Raises:
        ValueError: unusable scores and for a count that an axis does not have or may not go down to.
    """
    return keep_counts(
        axes, scores, {axis.name: counts[axis.kind] for axis in axes if axis.size and axis.kind in counts}
    )


def keep_counts(axes: Sequence[Axis], scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Plan:
    """The plan that keeps, in every axis named, that many units with the highest scores.

    Raises:
        ValueError: as `keep_best` does.
    """
    kept: dict[str, tuple[int, ...]] = {}
    for axis in axes:
        if axis.name in counts:
            _check_scores(axis, scores)
            n = counts[axis.name]
            if not axis.fewest <= n <= axis.size:
                raise ValueError(f"cannot keep {n} units of {axis.name}; wanted {axis.fewest} to {axis.size}")
            best: list[int] = removal_order(scores[axis.name])[axis.size - n :].tolist()  # pyright: ignore
            kept[axis.name] = tuple(sorted(best))
    return Plan(kept)


def _items(
    pool: Sequence[Axis], scores: Mapping[str, Tensor], flat: Flat, budget: Budget, removed: Mapping[str, Tensor]
) -> tuple[Tensor, Items]:
    """Units that are kept in any case [units], bool, and the items above them."""
    start = torch.zeros(flat.units, dtype=torch.bool)
    of_unit = torch.full((flat.units,), -1)
    worths: list[Tensor] = []
    groups: list[Tensor] = []
    closing: list[Tensor] = []
    n_items = 0
    # Groups last first and units best first, so that a stable descending sort admits them in the reverse of the order
    # of removal.
    for group, members in reversed(list(enumerate(_groups(pool, budget)))):
        best = [_best_first(pool[i], scores, removed) for i in members]
        size = min(pool[i].size for i in members)
        available = min(
            pool[i].size - int(removed[pool[i].name].sum()) if pool[i].name in removed else pool[i].size
            for i in members
        )
        ranked = torch.stack(
            [scores[pool[i].name].detach().cpu().double()[order[:size]] for i, order in zip(members, best, strict=True)]
        )
        allowed = budget.allowed(pool[members[0]].kind, size, max(min(size, budget.fewest(pool[i])) for i in members))
        counts = torch.tensor([count for count in allowed if count <= available])
        if not len(counts):
            raise ValueError(
                f"{pool[members[0]].name} has {available} units left, fewer than the {allowed[0]} that must be kept"
            )
        item = torch.searchsorted(counts, torch.arange(size), right=True) - 1  # -1 below the smallest count
        n_new = len(counts) - 1
        rising = (item >= 0) & (item < n_new)  # from n_new on: removed
        sums = torch.zeros(n_new, dtype=torch.float64).index_add_(0, item[rising], ranked.mean(dim=0)[rising])
        if n_new:
            worths.append(
                (sums / counts.diff()).cummin(dim=0).values
            )  # rounding of a mean must not put a worse item before a better one
        groups.append(torch.full((n_new,), group))
        closing.append(torch.full((n_new,), all(piece.unit is None for i in members for piece in pool[i].slices)))
        for i, order in zip(members, best, strict=True):
            units = order[:size] + flat.starts[i]
            start[units[item < 0]] = True
            of_unit[units[rising]] = item[rising] + n_items
        n_items += n_new
    admission = torch.sort(
        torch.cat([*worths, torch.zeros(0, dtype=torch.float64)]), descending=True, stable=True
    ).indices
    number = torch.empty_like(admission).scatter_(0, admission, torch.arange(n_items))
    of_unit[of_unit >= 0] = number[of_unit[of_unit >= 0]]
    return start, Items(of_unit, torch.cat(groups)[admission], torch.cat(closing)[admission])


def _best_first(axis: Axis, scores: Mapping[str, Tensor], removed: Mapping[str, Tensor]) -> Tensor:
    """The units of an axis [size], best first, removed ones last."""
    best = removal_order(scores[axis.name]).flip(0)
    if axis.name not in removed:
        return best
    last = removed[axis.name].cpu()[best]
    return torch.cat([best[~last], best[last]])


def _groups(pool: Sequence[Axis], budget: Budget) -> list[list[int]]:
    """Positions of the axes that keep the same number of units."""
    groups: dict[str, list[int]] = {}
    for i, axis in enumerate(pool):
        own = axis.name if axis.within is None else f"within {axis.within[0]}"
        groups.setdefault(axis.kind if axis.kind in budget.uniform_over else own, []).append(i)
    return list(groups.values())


def _land(items: Items, excess: Callable[[Tensor], float], tolerance: float, may_exceed: bool) -> Tensor:
    """The items admitted in order [items], bool, then changed where that brings the count nearer to the target.

    A coarse item that does not fit (a multiple of the hidden width, a head in every layer) can leave the count far
    below the target with all else admitted. While it is further away than the tolerance, the next item of each group in
    turn is taken as given and the rest filled around it, and the nearest result is kept.
    """

    def filled(given: Tensor) -> tuple[float, Tensor]:
        """How far from the target the items lie that are admitted around the given ones, and those items."""
        admitted = admit_greedily(items, lambda trial: excess(trial) <= 0, given)
        near = [(-excess(admitted), admitted)]
        if may_exceed:
            near += [
                (excess(more), more) for more in (_with(admitted, item) for item in items.next_of_groups(admitted))
            ]
        return min(near, key=lambda result: result[0])

    miss, admitted = filled(torch.zeros(len(items.group), dtype=torch.bool))
    while miss > tolerance:
        forced = [_with(admitted & (items.group == items.group[item]), item) for item in items.next_of_groups(admitted)]
        tried = [filled(given) for given in forced if excess(given) <= 0]
        nearest = min(tried, key=lambda result: result[0], default=(miss, admitted))
        if nearest[0] >= miss:
            break
        miss, admitted = nearest
    return admitted


def _with(admitted: Tensor, item: int) -> Tensor:
    """The admitted items [items] and one more."""
    more = admitted.clone()
    more[item] = True
    return more


def _check_scores(axis: Axis, scores: Mapping[str, Tensor]) -> None:
    if axis.name not in scores:
        raise ValueError(
            f"no scores for {axis.name}; every axis of the kinds that may be removed needs a score for each unit"
        )
    given = scores[axis.name]
    if tuple(given.shape) != (axis.size,):
        raise ValueError(f"scores for {axis.name} have shape {list(given.shape)}; wanted [{axis.size}]")
    if not bool(torch.isfinite(given).all()):
        raise ValueError(
            f"scores for {axis.name} hold NaN or infinity; wanted finite numbers, higher for units to keep"
        )
