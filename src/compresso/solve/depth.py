"""Plans that drop whole parts of a network: layers, attentions, MLPs. A part is a unit that owns its tensors whole."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, InfeasibleBudget, infeasible
from compresso.core.influence import least_distant_run
from compresso.core.plan import Plan
from compresso.core.quantities import Cost

Part = tuple[str, int]
"""Axis name and unit."""


def parts_of(axes: Sequence[Axis]) -> list[Part]:
    """The parts that are there, in order of axes and units; a sub-layer that was removed before has no tensors and is
    none.
    """
    return [
        (axis.name, unit)
        for axis in axes
        for unit in range(axis.size)
        if any(piece.unit == unit for piece in axis.slices)
    ]


def without(axes: Sequence[Axis], removed: Sequence[Part]) -> Plan:
    """The plan that keeps all units of these axes but those."""
    leaving = set(removed)
    return Plan(
        {axis.name: tuple(unit for unit in range(axis.size) if (axis.name, unit) not in leaving) for axis in axes}
    )


def drop_lowest(axes: Sequence[Axis], scores: Mapping[str, Tensor], n: int) -> Plan:
    """The plan without the n parts of the lowest scores (axis name -> [size]); of equal ones the first in order goes
    first.

    Raises:
        InfeasibleBudget: fewer may leave.
    """
    there = parts_of(axes)
    most = len(there) - sum(axis.fewest for axis in axes)
    if n > most:
        kinds = " and ".join(f"{axis.kind}s" for axis in axes)
        raise InfeasibleBudget(
            f"drop={n}: the model has {len(there)} {kinds}, of which at most {most} may leave; lower drop to {most}"
        )
    return without(axes, sorted(there, key=lambda part: float(scores[part[0]][part[1]]))[:n])


def drop_run(axis: Axis, distances: Tensor, cost: Cost, budget: Budget, n: int | None = None) -> Plan:
    """The plan without the least turning contiguous run of layers: of n layers, or of as few as the budget takes.

    axis: the layers. distances: [size + 1, size + 1], as `least_distant_run` reads them.

    Raises:
        InfeasibleBudget: no run will do.
    """
    limit = budget.limit(cost)

    def fits(run: range) -> bool:
        if n is not None:
            return len(run) == n
        return float(cost.of(without([axis], [(axis.name, unit) for unit in run])).count(budget.of)) <= limit

    run = least_distant_run(distances, fits)
    if run is None and n is not None:
        raise InfeasibleBudget(
            f"drop={n}: the model has {axis.size} layers, of which at most {axis.size - 1} may leave; lower drop to"
            f" {axis.size - 1}"
        )
    if run is None:
        raise infeasible(budget, [axis], cost, without([axis], [(axis.name, unit) for unit in range(axis.size - 1)]))
    return without([axis], [(axis.name, unit) for unit in run])


def absorbed(axes: Sequence[Axis], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks without the layers of which nothing is left: one without attention and MLP computes nothing, and no stock
    class could hold it. Masks that do not name layers are as they were, and those of a model of stages, which has a
    list of layers in each and a class of ours that holds such a layer.

    Args:
        axes: those of the masks, as the layers' units are found by their `layer`.
        masks: axis name -> [size], 0 for what leaves. A sub-layer is gone if it is closed itself or all of its units
            are.
    """
    lists = [axis for axis in axes if axis.kind == Kind.LAYER and axis.name in masks]
    if len(lists) != 1:
        return dict(masks)
    (layers,) = lists
    left = {kind: torch.zeros(layers.size, dtype=torch.bool) for kind in (Kind.ATTENTION, Kind.MLP)}
    within = {Kind.HEAD: Kind.ATTENTION, Kind.CHANNEL: Kind.MLP}
    named = [axis for axis in axes if axis.name in masks]
    for axis in named:
        if axis.kind in within and axis.layer is not None:
            left[within[axis.kind]][axis.layer] = bool((masks[axis.name] > 0).any())
    for kind in left:
        if not any(within.get(axis.kind) == kind for axis in named):
            left[kind][:] = True  # whole
        for axis in named:
            if axis.kind == kind:
                left[kind] &= masks[axis.name].cpu() > 0
    empty = ~(left[Kind.ATTENTION] | left[Kind.MLP])
    stays = masks[layers.name].clone()
    stays[empty.to(stays.device)] = 0
    if int((stays > 0).sum()) < layers.fewest:
        return dict(masks)
    return {**masks, layers.name: stays}
