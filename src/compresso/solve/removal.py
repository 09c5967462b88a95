"""One round of a removal in rounds: the units of the lowest scores that together are worth no more than the round may
take.

Bonsai's rule (arXiv 2402.05406), counted exactly. It is not `allocate`, which ends at or below a size, puts units back
that still fit, and may take any unit: a round ends before the first unit that is too much for it, and leaves units
alone of which it has learned nothing. The last round, which has to meet the budget, is a case for `allocate`. As there,
units of axes that keep as many each leave at once, one of each axis, for the mean of their scores.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.plan import Plan
from compresso.core.quantities import Cost, CostName


def lowest_within(
    axes: Sequence[Axis],
    scores: Mapping[str, Tensor],
    cost: Cost,
    of: CostName,
    allowance: float,
    *,
    ties: Mapping[str, Tensor] | None = None,
    fewest: Mapping[str, int] | None = None,
) -> Plan:
    """The plan without the longest run of lowest scores whose removal takes at most `allowance` from a count. It names
    all axes given.

    Args:
        axes: those that may lose units.
        scores: axis name -> [size]; higher is kept; comparable across axes. Units of infinite score are always kept.
        cost: counts the model as it is.
        of: what is counted.
        allowance: how much may leave; a plan that removes nothing where the lowest unit is worth more.
        ties: axis name -> [size], comparable across axes: of units of the same score, the one with less leaves first.
            Without, or where they are the same, too, the first in order of axes and units. A penalty on absolute
            coefficients makes many of them 0.
        fewest: axis name -> units that are kept at least; the axis' own where not given.

    Raises:
        ValueError: a score is missing, NaN, minus infinity or of the wrong shape.
    """
    order = _order(axes, scores, ties or {}, fewest or {})
    dense = float(cost().count(of))
    place = {axis.name: torch.full((axis.size,), len(order)) for axis in axes}  # in the order; kept units come after it
    for i, units in enumerate(order):
        for name, unit in units:
            place[name][unit] = i

    def without(n: int) -> dict[str, Tensor]:
        """The masks without the first n of the order."""
        return {name: (places >= n).double() for name, places in place.items()}

    n = bisect_right(range(1, len(order) + 1), allowance, key=lambda n: dense - float(cost(without(n)).count(of)))
    return Plan.from_masks(axes, without(n))


def _order(
    axes: Sequence[Axis], scores: Mapping[str, Tensor], ties: Mapping[str, Tensor], fewest: Mapping[str, int]
) -> list[list[tuple[str, int]]]:
    """What may leave at once, in the order of leaving: one unit, or one of each axis that keeps as many."""
    together: dict[str, list[int]] = {}
    ranked: list[list[tuple[float, float, int]]] = []
    for i, axis in enumerate(axes):
        given = scores.get(axis.name)
        if given is None or tuple(given.shape) != (axis.size,) or bool((given.isnan() | (given == -torch.inf)).any()):
            raise ValueError(f"scores for {axis.name} are missing, NaN, minus infinity or not of shape [{axis.size}]")
        of_unit: list[float] = given.detach().cpu().double().tolist()  # pyright: ignore
        second: list[float] = (
            ties[axis.name].detach().cpu().double().tolist() if axis.name in ties else [0.0] * axis.size
        )  # pyright: ignore
        mine = sorted((score, tie, unit) for unit, (score, tie) in enumerate(zip(of_unit, second, strict=True)))
        ranked.append(mine[: max(axis.size - max(axis.fewest, fewest.get(axis.name, 0)), 0)])
        together.setdefault(axis.name if axis.within is None else f"within {axis.within[0]}", []).append(i)
    found: list[tuple[float, float, int, int, list[tuple[str, int]]]] = []
    for members in together.values():
        for units in zip(*(ranked[i] for i in members), strict=False):  # of unequal axes those that all of them have
            score, tie = (fmean(unit[at] for unit in units) for at in (0, 1))
            if score < float("inf"):
                leaving = [(axes[i].name, unit) for i, (_, _, unit) in zip(members, units, strict=True)]
                found.append((score, tie, members[0], units[0][2], leaving))
    return [leaving for *_, leaving in sorted(found, key=lambda entry: entry[:4])]
