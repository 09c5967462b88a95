"""The count of each parameter as a product of scalars that are read off masks; `compresso.core.cost` evaluates them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.grid import Grid, grids
from compresso.core.weight import Weight

Atom = tuple[str, int | str | Grid]
"""A scalar read off masks: an axis and "sum", of its units, "any", whether one is left, the number of one unit, whose
value it is, or a grid, whose entries it counts.
"""


@dataclass
class Products:
    """Factors by parameter; each names an atom by its place, from 1 on: 0 is the constant one.

    Args:
        atoms: the scalars.
        factors: of all entries of a parameter.
        rows: of its outputs and of its presence: cached entries.
        chosen: of a stack of experts, the factor that counts them.
        constants: entries that no factor counts.
        row_constants: cached entries that no factor counts, by parameter in the order of weights.
    """

    atoms: list[Atom] = field(default_factory=list[Atom])
    factors: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    rows: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    chosen: dict[str, int] = field(default_factory=dict[str, int])
    constants: dict[str, int] = field(default_factory=dict[str, int])
    row_constants: list[int] = field(default_factory=list[int])


def products_of(axes: Sequence[Axis], weights: Sequence[Weight]) -> Products:
    """Compile the products of a model.

    Raises:
        ValueError: a slice names an unknown parameter or does not fit its shape, or axes within another do not lie in
            its units alike.
    """
    return _Compiler(axes, weights).products


class _Compiler:
    """The products, axis by axis."""

    def __init__(self, axes: Sequence[Axis], weights: Sequence[Weight]) -> None:
        self._by_name = {weight.name: weight for weight in weights}
        self._columns: dict[Atom, int] = {}
        self._entries: dict[tuple[str, int], int] = {}  # of one unit along a dimension
        self._sizes: dict[tuple[str, int], int] = {}  # units along it
        self._divided = grids(axes)
        self.products = Products(
            factors={weight.name: [] for weight in weights}, rows={weight.name: [] for weight in weights}
        )
        for axis in axes:
            self._units(axis)
            self._tilings(axis)
            self._presences(axis)
        for weight in weights:
            constant = 1
            for dim, length in enumerate(weight.shape):
                constant *= self._entries.get((weight.name, dim), length)
            self.products.constants[weight.name] = constant
            self.products.row_constants.append(weight.cached // self._sizes.get((weight.name, weight.output), 1))

    def _atom(self, axis: str, what: int | str | Grid) -> int:
        """The place of a scalar, a new one where it is asked for first."""
        key = (axis, what)
        if key not in self._columns:
            self._columns[key] = len(self.products.atoms) + 1
            self.products.atoms.append(key)
        return self._columns[key]

    def _units(self, axis: Axis) -> None:
        """Tensors that single units own."""
        for piece in axis.slices:
            if piece.param not in self._by_name:
                raise ValueError(f"axis {axis.name} slices '{piece.param}', which is not a parameter of the model")
            if piece.unit is not None:
                if not 0 <= piece.unit < axis.size:
                    raise ValueError(
                        f"axis {axis.name} has {axis.size} units; {piece.param} cannot belong to unit {piece.unit}"
                    )
                index = self._atom(axis.name, piece.unit)
                self.products.factors[piece.param].append(index)
                self.products.rows[piece.param].append(index)

    def _tilings(self, axis: Axis) -> None:
        """Dimensions that all units share."""
        for (param, dim), pieces in axis.tilings().items():
            weight = self._by_name[param]
            if not 0 <= dim < len(weight.shape):
                raise ValueError(
                    f"axis {axis.name} lies along dim {dim} of {param}, whose shape is {list(weight.shape)}"
                )
            width, length = sum(piece.width for piece in pieces), weight.shape[dim]
            if axis.within is not None and axis.tiles(pieces, length):
                continue  # the axis around it counts both
            if not axis.tiles(pieces, length) or (param, dim) in self._entries:
                raise ValueError(
                    f"axis {axis.name}: {axis.size} units of {width} cannot tile dim {dim} ({length}) of {param}"
                )
            grid = self._divided.get((param, dim))
            self._entries[param, dim], self._sizes[param, dim] = width if grid is None else 1, axis.size
            index = self._atom(axis.name, "sum" if grid is None else grid)
            self.products.factors[param].append(index)
            if weight.routed and dim == 0:
                self.products.chosen[param] = index
            if dim == weight.output:
                self.products.rows[param].append(self._atom(axis.name, "sum"))

    def _presences(self, axis: Axis) -> None:
        """Tensors that leave with the last unit."""
        for name in axis.with_last_unit:
            if name not in self._by_name:
                raise ValueError(
                    f"axis {axis.name} takes '{name}' with its last unit, which is not a parameter of the model"
                )
            self.products.factors[name].append(self._atom(axis.name, "any"))


def padded(lists: Sequence[Sequence[int]]) -> Tensor:
    """Index lists as one matrix [len(lists), longest], filled with 0: the constant one."""
    longest = max((len(one) for one in lists), default=0) or 1
    return torch.tensor([[*one, *([0] * (longest - len(one)))] for one in lists], dtype=torch.long)
