"""What left a model, seen from what is left: the linears that lost inputs, and those that stand before a gap.

The residual stream is written by two linears a block, that of the attention and that of the FFN. In the order of
computation they are the places of the dense model. A place is left, narrower or not, or it is gone, with its sub-layer
or with its block. What is gone is absorbed by the last place before it that is left: its linear is to write what all of
them wrote together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Kind
from compresso.sweep.targets import matrix

WRITERS = (Kind.ATTENTION, Kind.MLP)
"""The sub-layers of a block that write to the stream, in order."""


class Refit(StrEnum):
    """Which linears are fitted."""

    BEFORE = "before"
    """Those before something that left whole."""
    GAPS = "gaps"
    """Those, and all that lost inputs."""
    BEHIND = "behind"
    """Those, and all behind the first of them."""


@dataclass(frozen=True, order=True)
class Place:
    """Behind a sub-layer of the dense model.

    Args:
        layer: its block.
        sub_layer: 0 for the attention, 1 for the FFN.
    """

    layer: int
    sub_layer: int

    @property
    def kind(self) -> Kind:
        """The sub-layer's kind."""
        return WRITERS[self.sub_layer]


@dataclass(frozen=True)
class Consumer:
    """A linear that is to be fitted.

    Args:
        layer: its block in the smaller model.
        module: its name there.
        place: its own in the dense model.
        until: the last place that it has to make up for: its own, or the end of the gap behind it.
        narrower: whether it, or its sub-layer, lost inputs.
        columns: inputs that it has left.
    """

    layer: int
    module: str
    place: Place
    until: Place
    narrower: bool
    columns: int


@dataclass(frozen=True)
class Lost:
    """What left, by who makes up for it.

    Args:
        consumers: in the order of computation.
        unabsorbed: places that are gone with nothing before them.
    """

    consumers: tuple[Consumer, ...]
    unabsorbed: tuple[Place, ...]


def writers(model: PreTrainedModel, arch: Arch) -> Mapping[Place, str]:
    """The linears that write to the stream, by name, in the order of computation."""
    found = {
        Place(gate.unit, WRITERS.index(axis.kind)): gate.module
        for axis in arch.axes(model)
        if axis.kind in WRITERS
        for gate in axis.gates
        if gate.unit is not None
    }
    return dict(sorted(found.items()))


def lost(
    dense: PreTrainedModel,
    smaller: PreTrainedModel,
    arch: Arch,
    layers: Sequence[int],
    fewer_dimensions: bool = False,
    refit: Refit = Refit.GAPS,
) -> Lost:
    """What left of a model; needs shapes only.

    Args:
        dense, smaller: the models.
        arch: describes both.
        layers: the dense model's number of each of the smaller one's blocks.
        fewer_dimensions: whether the stream lost dimensions: every sub-layer lost inputs then.
        refit: which linears are to be fitted.
    """
    were, are = writers(dense, arch), writers(smaller, arch)
    left = {Place(layers[place.layer], place.sub_layer): (place.layer, name) for place, name in are.items()}
    consumers: list[Consumer] = []
    unabsorbed: list[Place] = []
    for place, name in were.items():
        if place in left:
            layer, module = left[place]
            columns = matrix(smaller, module).shape[1]
            narrower = fewer_dimensions or columns < matrix(dense, name).shape[1]
            consumers.append(Consumer(layer, module, place, place, narrower, columns))
        elif consumers:
            last = consumers[-1]
            consumers[-1] = Consumer(last.layer, last.module, last.place, place, last.narrower, last.columns)
        else:
            unabsorbed.append(place)
    needed = [one.until > one.place or (one.narrower and refit is not Refit.BEFORE) for one in consumers]
    first = needed.index(True) if True in needed else len(needed)
    chosen = [one for i, one in enumerate(consumers) if needed[i] or (refit is Refit.BEHIND and i > first)]
    return Lost(tuple(chosen), tuple(unabsorbed))
