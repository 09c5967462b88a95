"""Which experts stay: as many in every layer, and as many in every group of a router that chooses groups first; or the
best of all layers in one pool.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.plan import Plan

NONE_CAN_LEAVE = "so no expert of this router can leave: take a stage that removes other units"


def even_counts(axes: Sequence[Axis], keep: float) -> dict[str, int]:
    """How many experts each layer keeps: all but floor(experts x (1 - keep)), the same number in each group.

    Args:
        axes: of experts.
        keep: share of each layer's experts.

    Raises:
        ValueError: naming the layer and the number, if its router chooses among more than stay.
    """
    found: dict[str, int] = {}
    for axis in axes:
        leave = int(axis.size * (1 - keep) + 1e-9)
        found[axis.name] = axis.size - round(leave / axis.groups) * axis.groups
        _check(axis, found[axis.name], f"keep={keep:g}")
    return found


def said_of_counts(axes: Sequence[Axis], keep: float) -> list[str]:
    """A sentence for each number of experts that `even_counts` rounds away from what a share asks for, and for layers
    that lose none under one below 1.
    """
    left, found = even_counts(axes, keep), dict[str, None]()
    for axis in axes if keep < 1 else ():
        asked, stay = axis.size - int(axis.size * (1 - keep) + 1e-9), left[axis.name]
        groups = f", as many in each of its router's {axis.groups} groups" if axis.groups > 1 else ""
        most = (axis.size - axis.groups) / axis.size
        less = f"; {most:.4g} is the largest keep that takes some away" if most * axis.size >= axis.min_units else ""
        if stay == axis.size:
            found[f"keep={keep:g} takes none of the {stay} experts of a layer away{groups}{less}"] = None
        elif stay != asked:
            found[f"{stay} of {axis.size} experts of a layer stay, not the {asked} asked for{groups}"] = None
    return [*found]


def _check(axis: Axis, left: int, asked: str) -> None:
    """Raise ValueError if a layer's router needs more than are left."""
    if left < axis.min_units:
        groups = f" in {axis.groups} groups" if axis.groups > 1 else ""
        cure = f"so keep {axis.min_units / axis.size:.3g} or more" if axis.min_units < axis.size else NONE_CAN_LEAVE
        raise ValueError(
            f"{asked} leaves {axis.name} with {left} of {axis.size} experts{groups}, and its router chooses among at"
            f" least {axis.min_units}, {cure}"
        )


def best_of_layers(axes: Sequence[Axis], scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Plan:
    """The plan that keeps each layer's best, as many in each group; of equal scores the lowest number stays.

    Args:
        axes: of experts.
        scores: axis name -> [size].
        counts: axis name -> how many stay, a multiple of its groups.
    """
    kept: dict[str, tuple[int, ...]] = {}
    for axis in axes:
        each = counts[axis.name] // axis.groups
        order = scores[axis.name].unflatten(0, (axis.groups, -1)).argsort(dim=1, descending=True, stable=True)
        start = torch.arange(axis.groups).unsqueeze(1) * (axis.size // axis.groups)
        kept[axis.name] = tuple(sorted((order[:, :each] + start).flatten().tolist()))
    return Plan(kept)


def best_of_all(axes: Sequence[Axis], scores: Mapping[str, Tensor], keep: float) -> Plan:
    """The plan without the lowest round(experts x (1 - keep)) of all layers together, of which none falls below what
    its router needs.

    Args:
        axes: of experts, without groups.
        scores: axis name -> [size], comparable across layers.
        keep: share of all experts.

    Raises:
        ValueError: routers need more than would stay, or choose groups first.
    """
    if grouped := [axis.name for axis in axes if axis.groups > 1]:
        raise ValueError(
            f"the router of {grouped[0]} chooses groups first, which one pool would empty; give pool: layer"
        )
    total = sum(axis.size for axis in axes)
    leave = round(total * (1 - keep))
    for axis in axes:
        _check(axis, axis.size, f"keep={keep:g}")
    if total - leave < (least := sum(axis.min_units for axis in axes)):
        raise ValueError(
            f"keep={keep:g} leaves {total - leave} of {total} experts, and routers choose among {least}; keep"
            f" {math.ceil(least / total * 1e4) / 1e4:g} or more"
        )
    left = {axis.name: set(range(axis.size)) for axis in axes}
    fewest = {axis.name: axis.min_units for axis in axes}
    pool = [(float(scores[axis.name][unit]), i, -unit) for i, axis in enumerate(axes) for unit in range(axis.size)]
    for _, i, unit in sorted(pool):
        name = axes[i].name
        if leave and len(left[name]) > fewest[name]:
            left[name].discard(-unit)
            leave -= 1
    return Plan({name: tuple(sorted(units)) for name, units in left.items()})


def choices_lost(often: Mapping[str, Tensor], plan: Plan) -> tuple[float, float]:
    """Share of the routers' choices that fell on experts that leave, and what it would be if each layer lost as many,
    those that are chosen least.

    Args:
        often: axis name -> how often each expert was chosen [size].
        plan: what stays of each of them.
    """
    lost = least = every = 0.0
    for name, counts in often.items():
        leave = sorted({*range(len(counts))} - {*plan.kept[name]})
        lost += float(counts[leave].sum())
        least += float(counts.sort()[0][: len(leave)].sum())
        every += float(counts.sum())
    return lost / max(every, 1), least / max(every, 1)
