"""Admit units best first until nothing more fits: the search that every landing on a budget shares.

Units lie in one flat vector. An item is what is admitted at once: a unit, a multiple of units, or one unit of every
layer. Items are numbered in the order of admission. Each step admits the longest run of items that fits, found by
bisection, then passes over the item that does not fit and, where its whole group costs at least as much from now on,
over its group. That gives exactly the result of trying every item in turn, with a number of counts that grows with the
number of groups and not of units.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.core.axis import Axis


@dataclass(frozen=True)
class Items:
    """What may be admitted, in order.

    Args:
        of_unit: [units], int64: the item each unit belongs to; -1 for units that are not up for admission.
        group: [items], int64: items of one group cost the same, and are admitted in order.
        closing: [items], bool: if this item does not fit, no later item of its group ever will. True where units tile
            their tensors: admitting others only makes them dearer. False where units own whole tensors of different
            sizes.
    """

    of_unit: Tensor
    group: Tensor
    closing: Tensor

    def units(self, admitted: Tensor, start: Tensor) -> Tensor:
        """Which units are kept [units], bool, if these items [items] join those kept from the start [units]."""
        if not len(admitted):
            return start
        return torch.where(self.of_unit >= 0, admitted[self.of_unit.clamp(min=0)], start)

    def next_of_groups(self, admitted: Tensor) -> list[int]:
        """The first item of each group that is not admitted [items], for the groups that have one."""
        waiting = (~admitted).nonzero().flatten()
        groups = self.group[waiting]
        return [int(waiting[groups == group][0]) for group in sorted(set(groups.tolist()))]  # pyright: ignore


def admit_greedily(items: Items, fits: Callable[[Tensor], bool], given: Tensor | None = None) -> Tensor:
    """The items admitted [items], bool: in order, each that still fits.

    Args:
        items: what may be admitted.
        fits: whether these items [items], bool, are within the budget. Once false, it stays false as items are added.
        given: items [items], bool, admitted before all others; they must fit. None: none.
    """
    admitted = torch.zeros(len(items.group), dtype=torch.bool) if given is None else given.clone()
    waiting = ~admitted
    while bool(waiting.any()):
        queue = waiting.nonzero().flatten()

        def run_fits(length: int, queue: Tensor = queue) -> bool:
            trial = admitted.clone()
            trial[queue[:length]] = True
            return fits(trial)

        run = _longest(len(queue), run_fits)
        admitted[queue[:run]] = True
        waiting[queue[:run]] = False
        if run < len(queue):
            refused = queue[run]
            waiting[refused] = False
            if bool(items.closing[refused]):
                waiting[items.group == items.group[refused]] = False
    return admitted


def _longest(n: int, fits: Callable[[int], bool]) -> int:
    """The largest length in [0, n] that fits, for a predicate that holds up to it and at 0; looks near 0 first."""
    low, high, step = 0, 1, 1
    while low < n and fits(high):
        step *= 2
        low, high = high, min(n, high + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Flat:
    """Axes laid end to end, and back: one vector of all their units, in the order of the axes.

    >>> from compresso.core.axis import Kind
    >>> flat = Flat([Axis("a", Kind.HEAD, 2, (), (), ""), Axis("b", Kind.HEAD, 1, (), (), "")])
    >>> flat.split(torch.tensor([5, 6, 7]))
    {'a': tensor([5, 6]), 'b': tensor([7])}
    """

    def __init__(self, axes: list[Axis]) -> None:
        """Remember names, sizes and where each axis starts."""
        self.names = [axis.name for axis in axes]
        self.sizes = [axis.size for axis in axes]
        self.starts = [sum(self.sizes[:i]) for i in range(len(axes))]
        self.units = sum(self.sizes)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Views of a vector [units] by axis name, each [size]."""
        return {
            name: values[at : at + size] for name, at, size in zip(self.names, self.starts, self.sizes, strict=True)
        }

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The axes' vectors end to end [units], in float64 on the CPU, without gradient."""
        device = values[self.names[0]].device if self.names else "cpu"
        return torch.cat([values[name].detach().to(device) for name in self.names]).to(
            device="cpu", dtype=torch.float64
        )
