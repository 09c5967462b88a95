"""What a trace shows of a model: axes, in whatever layout their units lie, and dimensions that stay."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.core.axis import Axis, Gate, Kind, Slice
from compresso.discover.labels import Place, Source
from compresso.errors import ArchError


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """Which unit owns each index of a parameter dimension.

    Args:
        param: qualified parameter name.
        dim: the dimension.
        unit_of: unit of each index, int64; any layout, so that a fused projection can hold a unit's rows in several
            places.
        why: what the operation that brought it in does with it.
    """

    param: str
    dim: int
    unit_of: Tensor
    why: str

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Where the units lie: runs of all units in order, one behind the other; empty if they lie in any other way."""
        size, found, start = int(self.unit_of.max()) + 1, list[Slice](), 0
        while start < len(self.unit_of):
            rest = self.unit_of[start:]
            width = int((rest != 0).nonzero()[0]) if size > 1 and bool((rest != 0).any()) else len(rest)
            if width == 0 or not torch.equal(rest[: size * width], torch.arange(size * width) // width):
                return ()
            found.append(Slice(self.param, self.dim, width, start=start))
            start += size * width
        return tuple(found)

    @property
    def width(self) -> int | None:
        """Entries of one unit if one slice says where they lie, None if it takes several or cannot be said."""
        return slices[0].width if len(slices := self.slices) == 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """An axis as the trace shows it: which entries leave together, in whatever layout;
    `axis` is the same as an `Axis`.
    """

    name: str
    kind: Kind
    size: int
    owners: tuple[Owner, ...]
    whole: tuple[Slice, ...]
    gates: tuple[Gate, ...]
    container: str
    layer: int | None = None
    norms: tuple[str, ...] = ()

    @property
    def axis(self) -> Axis:
        """The axis.

        Raises:
            ArchError: the units lie in a parameter in an order that slices cannot say.
        """
        for owner in self.owners:
            if not owner.slices:
                raise ArchError(f"{self.name}: '{owner.param}' holds its units in no order along dimension {owner.dim}")
        tiled = tuple(piece for owner in self.owners for piece in owner.slices)
        fewest = 1 if self.kind in (Kind.HEAD, Kind.CHANNEL) else 0
        return Axis(
            self.name,
            self.kind,
            self.size,
            tiled + self.whole,
            self.gates,
            self.container,
            self.layer,
            min_units=fewest,
            norms=self.norms,
        )


@dataclass(frozen=True, slots=True)
class Fixed:
    """Parameter dimensions that belong together and have to be kept, and why."""

    sources: tuple[Source, ...]
    size: int
    place: Place
    why: str

    def __str__(self) -> str:
        return f"{self.sources[0][0]} dimension {self.sources[0][1]} stays: at {self.place} {self.why}"


@dataclass(frozen=True, slots=True)
class Discovery:
    """What can be removed from a model, and what cannot."""

    found: tuple[Found, ...]
    fixed: tuple[Fixed, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis.

        Raises:
            ArchError: one cannot be written as an `Axis`; see `Found.axis`.
        """
        return tuple(found.axis for found in self.found)
