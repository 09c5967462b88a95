"""Two levels of units on one dimension: query heads within key/value heads, or channels within heads, whose products
are summed unit by unit.

    entries = sum over g of  h_g (rest + width * sum over r of q_gr)

h_g is the mask of an outer unit, q_gr that of an inner one. With 0/1 masks it is what stays; with keep probabilities
that are independent of each other it is the expected number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.core.axis import Axis


@dataclass(frozen=True)
class Grid:
    """The entries of a dimension that an axis tiles and other axes divide further.

    Args:
        inner: the axis within each unit of the outer one, in order.
        slots: units of each of them.
        width: entries of one of these units.
        rest: entries of an outer unit that lie in none of them (keys and values beside queries).
    """

    inner: tuple[str, ...]
    slots: int
    width: int
    rest: int

    @property
    def dense(self) -> int:
        """Entries of the whole dimension."""
        return len(self.inner) * self.of_outer

    @property
    def of_outer(self) -> int:
        """Entries of one outer unit."""
        return self.rest + self.width * self.slots

    def entries(self, outer: Tensor | None, masks: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """How many entries are kept, float64 [].

        Args:
            outer: mask of the outer axis [units]; None where it keeps all.
            masks: axis name -> [size]; inner axes that it does not name keep all.
        """
        whole = torch.tensor(float(self.slots), dtype=torch.float64, device=device)
        inner = [masks[name].sum(dtype=torch.float64) if name in masks else whole for name in self.inner]
        each = self.rest + self.width * torch.stack(inner)
        return each.sum() if outer is None else (outer.to(torch.float64) * each).sum()


def grids(axes: Sequence[Axis]) -> dict[tuple[str, int], Grid]:
    """(parameter, dimension) -> the grid on it.

    Axes of one last name divide the same dimensions.

    Raises:
        ValueError: axes within another do not lie in its units, one alike in each.
    """
    by_name = {axis.name: axis for axis in axes}
    inside: dict[tuple[str, str], dict[int, Axis]] = {}
    for axis in axes:
        if axis.within is not None:
            outer, unit = axis.within
            units = inside.setdefault((outer, axis.name.rpartition(".")[2]), {})
            if outer not in by_name or unit in units:
                raise ValueError(f"axis {axis.name} lies within unit {unit} of {outer}, which is not there or taken")
            units[unit] = axis
    found: dict[tuple[str, int], Grid] = {}
    for (name, _), units in inside.items():
        outer = by_name[name]
        if sorted(units) != list(range(outer.size)):
            raise ValueError(f"axes lie within {len(units)} of {outer.size} units of {name}; wanted one in each")
        inner = [units[unit] for unit in range(outer.size)]
        for key in inner[0].tilings():
            found[key] = _grid(outer, inner, key)
    return found


def _grid(outer: Axis, inner: Sequence[Axis], key: tuple[str, int]) -> Grid:
    """The grid on one dimension. Raises ValueError where the inner axes are not alike or leave their outer unit."""
    around, size = outer.tilings().get(key, []), inner[0].size
    pieces = [axis.tilings().get(key, []) for axis in inner]
    width = sum(piece.width for piece in pieces[0])
    for unit, (axis, own) in enumerate(zip(inner, pieces, strict=True)):
        ranges = [(piece.start + unit * piece.width, piece.start + (unit + 1) * piece.width) for piece in around]
        if (
            axis.size != size
            or sum(piece.width for piece in own) != width
            or not all(any(a <= p.start and p.start + size * p.width <= b for a, b in ranges) for p in own)
        ):
            raise ValueError(f"axis {axis.name}: its entries of {key[0]}, dim {key[1]}, do not lie in its unit alike")
    rest = sum(piece.width for piece in around) - size * width
    return Grid(tuple(axis.name for axis in inner), size, width, rest)
