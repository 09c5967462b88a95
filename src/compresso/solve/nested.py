"""The nested orders of one sub-layer, from the weights of the linear that reads its units and the second moment of what
it reads.

Heads that share keys and values leave in two ways. First, one query head of every key/value head leaves, again and
again, until each has one left; from the whole and from each of these states key/value heads leave one by one. All of
it is exact: every removal is scored after the ones before it, and at the fit that they leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.obs_groups import Elimination, nested, quadratic
from compresso.solve.bank import Ladder, SubLayer


@dataclass(frozen=True)
class Site:
    """Where a sub-layer lies.

    Args:
        layer: its layer.
        kind: ATTENTION or MLP.
        consumer: the linear that reads its units and writes to the stream, by full name.
        units: the axis of its units; None where they all stay.
        queries: the axes of the query heads in each unit; empty where they share no key/value head.
    """

    layer: int
    kind: Kind
    consumer: str
    units: Axis | None
    queries: tuple[Axis, ...]

    @property
    def slots(self) -> int:
        """Query heads of a unit; 1 for channels."""
        return self.queries[0].size if self.queries else 1


def sites(axes: Sequence[Axis]) -> list[Site]:
    """The sub-layers of a model that are there, in the order of computation; axes: with those of query heads."""
    units = {(axis.layer, axis.kind): axis for axis in axes if axis.kind in (Kind.HEAD, Kind.CHANNEL)}
    found: list[Site] = []
    for axis in axes:
        if axis.kind in (Kind.ATTENTION, Kind.MLP):
            inner = Kind.HEAD if axis.kind == Kind.ATTENTION else Kind.CHANNEL
            for gate in axis.gates:
                assert gate.unit is not None
                mine = units.get((gate.unit, inner))
                shared = [one for one in axes if mine is not None and one.within and one.within[0] == mine.name]
                found.append(Site(gate.unit, axis.kind, gate.module, mine, tuple(shared)))
    return sorted(found, key=lambda site: (site.layer, site.kind == Kind.MLP))


def nested_sub_layer(
    site: Site, weight: Tensor, moment: Tensor, bias: Tensor | None = None, damping: float = 0.01
) -> SubLayer:
    """The orders and errors of a sub-layer.

    Args:
        site: which.
        weight: of its consumer, [out, in].
        moment: mean over tokens of x x^T, x being what the consumer reads and a 1 behind it [in + 1, in + 1]; tokens
            may be weighted.
        bias: of the consumer [out]; it stays as long as a unit does.
        damping: see `compresso.core.obs_groups.quadratic`.

    Raises:
        NotPositiveDefiniteError: the moment cannot be inverted.
    """
    cost = quadratic(moment[:-1, :-1], damping)
    whole = Elimination.of(weight, cost)
    gone = float(torch.trace(whole.gram @ cost.moment))
    if bias is not None:
        wide, mean = bias.double(), moment[-1].double()
        gone += float(2 * wide @ (weight.double() @ mean[:-1]) + wide @ wide * mean[-1])
    ladders, queries = list[Ladder](), list[list[int]]()
    size = weight.shape[1]
    if site.units is not None:
        n, slots = site.units.size, site.slots
        heads = torch.arange(size, device=weight.device).reshape(n, slots, -1)
        live, queries = [list(range(slots)) for _ in range(n)], [list[int]() for _ in range(n)]
        for left in range(slots, 0, -1):
            if left < slots:
                places = [(unit, one) for unit in range(n) for one in live[unit]]
                groups = torch.stack([heads[place] for place in places])
                for i in nested(whole, groups, [unit for unit, _ in places]).order:
                    unit, one = places[i]
                    live[unit].remove(one)
                    queries[unit].append(one)
            groups = torch.stack([heads[unit, live[unit]].flatten() for unit in range(n)]) if slots > 1 else heads[:, 0]
            found = nested(whole.fork() if left > 1 else whole, groups)
            ladders.append(Ladder(left, found.order, found.errors))
    return SubLayer(
        layer=site.layer,
        kind=site.kind,
        consumer=site.consumer,
        units=None if site.units is None else site.units.name,
        width=size if site.units is None else size // site.units.size,
        slots=site.slots,
        fewest=0 if site.units is None else site.units.fewest,
        ladders=tuple(ladders),
        queries=tuple(map(tuple, queries)) if site.slots > 1 else (),
        gone=gone,
        damping=cost.damping,
    )
