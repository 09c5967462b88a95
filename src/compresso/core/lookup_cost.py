"""Costs that no formula gives, looked up: what each module was measured to cost with each number of its units.

ZipLM (arXiv 2302.04089, section 3.2) prunes to a speedup by such a table of latencies. A model costs a fixed part and
the sum of its modules; a module that a layer, attention or MLP unit owns costs nothing once that unit leaves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.cost_table import CostTable, Field, every_count
from compresso.core.plan import Plan
from compresso.core.quantities import Amounts, Cost, CostName


@dataclass(frozen=True)
class _Measured:
    """Amounts that are looked up or counted when they are asked for."""

    of: CostName
    looked_up: Tensor
    counted: Callable[[], Amounts] | None

    def count(self, of: CostName) -> Tensor:
        """See `Amounts`."""
        if of == self.of:
            return self.looked_up
        if self.counted is None:
            raise ValueError(f"of='{of}' is not in a table of {self.of}; give the cost model that counts it, too")
        return self.counted().count(of)


class LookupCost:
    """A model measured by a table, and counted by another cost in all that the table does not measure.

    Measurements are made monotone first (least squares), as noise would let more units cost less. Keep probabilities
    cost what the table interpolates at the expected number of units.

    Args:
        axes: of the model.
        table: of the same model.
        model: the fields that the table must agree on.
        counts: answers for other quantities; None answers for none.

    Raises:
        ValueError: the table is of another model.
    """

    def __init__(
        self, axes: Sequence[Axis], table: CostTable, model: Mapping[str, Field], counts: Cost | None = None
    ) -> None:
        self.axes = tuple(axes)
        self.table = table
        self._counts = counts
        self._refuse_other_model(model)
        mine = [axis for axis in self.axes if axis.name in table.modules]
        self._rows = {axis.name: row for row, axis in enumerate(mine)}
        self._owners = _owners(self.axes, self._rows)
        longest = max((axis.size for axis in mine), default=1)
        costs = [every_count(table.modules[axis.name], longest) for axis in mine]
        self._costs = torch.tensor(costs, dtype=torch.float64).reshape(len(mine), longest + 1)
        self._sizes = torch.tensor([axis.size for axis in mine], dtype=torch.float64)

    def even(self, of: CostName) -> bool:
        """See `Cost`; a table need not be linear."""
        return of != self.table.of and self._counts is not None and self._counts.even(of)

    def __call__(self, masks: Mapping[str, Tensor] | None = None) -> Amounts:
        """See `Cost`.

        Raises:
            ValueError: for masks that remove what the table does not measure.
        """
        masks = masks or {}
        totals, present = self._sizes, torch.ones_like(self._sizes)
        for name, mask in masks.items():
            if name in self._rows:
                place = torch.tensor([self._rows[name]], device=mask.device)
                totals = totals.to(mask.device).index_copy(0, place, mask.sum(dtype=torch.float64).reshape(1))
            elif name in self._owners:
                factors = torch.ones_like(self._sizes).to(mask.device)
                for unit, rows in self._owners[name].items():
                    factors = factors.index_copy(
                        0, torch.tensor(rows, device=mask.device), mask[unit].double().expand(len(rows))
                    )
                present = present.to(mask.device) * factors
            else:
                self._refuse_removal(name, mask)
        counts = self._counts
        return _Measured(self.table.of, self._sum(totals, present), counts and (lambda: counts(masks)))

    def of(self, plan: Plan) -> Amounts:
        """See `Cost`."""
        return self(plan.masks(self.axes))

    def of_totals(self, names: Sequence[str], totals: Tensor) -> Amounts:
        """See `Cost`.

        Raises:
            ValueError: for axes that the table does not measure.
        """
        if lacking := [name for name in names if name not in self._rows]:
            raise ValueError(f"the table does not tell what {lacking[0]} costs from totals alone; count by masks")
        places = torch.tensor([self._rows[name] for name in names], dtype=torch.long, device=totals.device)
        every = self._sizes.to(totals.device).index_copy(0, places, totals.double())
        counts = self._counts
        amount = self._sum(every, torch.ones_like(every))
        return _Measured(self.table.of, amount, counts and (lambda: counts.of_totals(names, totals)))

    def tiled(self, names: Sequence[str]) -> bool:
        """See `Cost`."""
        return all(name in self._rows for name in names) and (self._counts is None or self._counts.tiled(names))

    def _sum(self, totals: Tensor, present: Tensor) -> Tensor:
        """The fixed part and what all modules cost [], given their units [modules] and whether they are there."""
        costs = self._costs.to(totals.device)
        lower = totals.detach().floor().clamp(min=0).minimum((self._sizes.to(totals.device) - 1).clamp(min=0))
        share, at = totals - lower, lower.long().unsqueeze(1)
        below, above = costs.gather(1, at).squeeze(1), costs.gather(1, at + 1).squeeze(1)
        return ((below * (1 - share) + above * share) * present.to(totals.device)).sum() + self.table.fixed

    def _refuse_other_model(self, model: Mapping[str, Field]) -> None:
        for name in sorted({*self.table.model, *model}):
            there, here = self.table.model.get(name, "absent"), model.get(name, "absent")
            if there != here:
                raise ValueError(f"the table is of another model: {name} is {there} in it, {here} here; measure anew")
        sizes = {axis.name: axis.size for axis in self.axes}
        for name, costs in self.table.modules.items():
            if name not in sizes:
                raise ValueError(f"the table is of another model: it measures {name}, which is not here; measure anew")
            if max(costs) != sizes[name]:
                raise ValueError(
                    f"the table is of another model: {name} has {max(costs)} units in it, {sizes[name]} here; measure"
                    " anew"
                )

    def _refuse_removal(self, name: str, mask: Tensor) -> None:
        if bool((mask != 1).any()):
            raise ValueError(
                f"the table does not tell what units of {name} cost; leave their kind out, or measure them"
            )


def _owners(axes: Sequence[Axis], rows: Mapping[str, int]) -> dict[str, dict[int, list[int]]]:
    """For axes whose units own whole tensors: unit -> rows of the modules that lie in those tensors."""
    module_of = {
        piece.param: rows[axis.name]
        for axis in axes
        if axis.name in rows
        for piece in axis.slices
        if piece.unit is None
    }
    found: dict[str, dict[int, list[int]]] = {}
    for axis in axes:
        for piece in axis.slices:
            if piece.unit is not None and piece.param in module_of and axis.name not in rows:
                of_unit = found.setdefault(axis.name, {}).setdefault(piece.unit, [])
                if module_of[piece.param] not in of_unit:
                    of_unit.append(module_of[piece.param])
    return found
