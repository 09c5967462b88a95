"""Which entries of which parameter every number in a forward comes from.

Every index of every parameter dimension starts as a class of its own; 0 means "belongs to nothing removable". A tensor
of the trace is one of three things:

    None       a constant: inputs, masks, position tables
    Weight     a parameter, perhaps transposed: one vector of classes for each dimension
    Tensor     activations: the class of every entry, int64, of the tensor's own shape

Operations join classes that have to leave together, or pin those that cannot leave.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compresso.errors import ArchError

Source = tuple[str, int]
"""A parameter's name and one of its dimensions."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter: for each dimension its classes,
    and the parameter dimension they came from (None if it was made up).
    """

    classes: tuple[Tensor, ...]
    sources: tuple[Source | None, ...]

    @property
    def wide(self) -> list[int]:
        """Dimensions with more than one entry."""
        return [d for d, classes in enumerate(self.classes) if len(classes) > 1]


Value = Weight | Tensor | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where something happens: a module and an operation."""

    module: str
    op: str

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} ({self.op})"


@dataclass
class Classes:
    """The classes of all parameter dimensions, and what the operations say about them.

    Joins are collected during a round and merged at its end; pins, reads, writes and norms are those of the current
    round.
    """

    first: dict[Source, int] = field(default_factory=dict)
    sizes: dict[Source, int] = field(default_factory=dict)
    canonical: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    pins: list[tuple[Tensor, Place, str]] = field(default_factory=list)
    reads: dict[Source, Place] = field(default_factory=dict)
    writes: dict[Source, Place] = field(default_factory=dict)
    norms: list[tuple[Tensor, Place]] = field(default_factory=list)
    attended: list[Tensor] = field(default_factory=list)
    _joins: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        """Give every index of every dimension of a parameter a class of its own; a dimension of size 1 broadcasts and
        has none.
        """
        for dim, size in enumerate(shape):
            if size > 1 or len(shape) == 1:
                self.first[name, dim], self.sizes[name, dim] = len(self.canonical), size
                self.canonical = torch.arange(len(self.canonical) + size)

    def of(self, source: Source) -> Tensor:
        """The classes along one parameter dimension."""
        if source not in self.first:
            return torch.zeros(1, dtype=torch.long)
        first = self.first[source]
        return self.canonical[first : first + self.sizes[source]]

    def weight(self, name: str, ndim: int) -> Weight:
        """A parameter as it enters the trace."""
        sources = tuple((name, dim) for dim in range(ndim))
        return Weight(tuple(self.of(source) for source in sources), sources)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Entries of equal index leave together; 0 joins nothing."""
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs != 0).all(dim=0)]
        if pairs.shape[1]:
            pairs = torch.unique(pairs, dim=1)
            self._joins.append((pairs[0], pairs[1]))

    def pin(self, classes: Tensor, place: Place, why: str) -> None:
        """These classes have to be kept."""
        found = torch.unique(classes)
        found = found[found != 0]
        if len(found):
            self.pins.append((found, place, why))

    def begin(self) -> None:
        """Forget what the last round said, but not what it joined."""
        for said in (self.pins, self.reads, self.writes, self.norms, self.attended, self._joins):
            said.clear()

    def merge(self) -> bool:
        """Merge what was joined; whether anything was."""
        if not self._joins:
            return False
        a, b = (torch.cat(side) for side in zip(*self._joins, strict=True))
        root = self.canonical
        while True:
            left, right = root[a], root[b]
            low, high = torch.minimum(left, right), torch.maximum(left, right)
            if bool((low == high).all()):
                break
            root = root.scatter_reduce(0, high, low, "amin")
            while not torch.equal(shorter := root[root], root):
                root = shorter
        self.canonical = root
        return True


def varying(labels: Tensor) -> list[int]:
    """Dimensions along which the classes change."""
    return [d for d in range(labels.ndim) if labels.shape[d] > 1 and bool((labels != labels.narrow(d, 0, 1)).any())]


def along(labels: Tensor, dim: int) -> Tensor:
    """The classes along one dimension, at index 0 of all others."""
    index: list[int | slice] = [0] * labels.ndim
    index[dim] = slice(None)
    return labels[tuple(index)]


def spread(classes: Tensor, dim: int, shape: tuple[int, ...]) -> Tensor:
    """Classes that lie along one dimension of a shape, the same at every index of the others."""
    view = [1] * len(shape)
    view[dim] = len(classes)
    return classes.view(view).expand(shape)


def as_entries(value: Weight, classes: Classes, place: Place) -> Tensor:
    """A parameter used as activations:
    its last wide dimension carries the classes, the others are positions and stay.
    """
    shape = tuple(len(c) for c in value.classes)
    wide = value.wide or [len(shape) - 1]
    for dim in wide[:-1]:
        classes.pin(value.classes[dim], place, "its entries are positions")
    return spread(value.classes[wide[-1]], wide[-1], shape)


def refuse(place: Place, why: str) -> ArchError:
    """The error for a model that cannot be proved safe."""
    return ArchError(f"{place} {why}; no axis can be proved safe here, so describe this architecture")
