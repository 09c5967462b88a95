"""What pruning takes of a model that computes with rounded weights: heads, then channels, then single weights, each by
the magnitudes of what is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.edit.magnitude_masks import owned, unit_masks, weight_masks
from compresso.edit.quantised import QuantisedModel


@dataclass(frozen=True)
class Leaving:
    """Shares that stay.

    Args:
        linears: names of the linears that single weights are taken of.
        weights: of each linear's weight.
        channels: of each FFN's channels.
        heads: of each attention's heads.
    """

    linears: Sequence[str]
    weights: float
    channels: float
    heads: float

    def of(self, axes: Sequence[Axis]) -> list[str]:
        """Names of the parameters that pruning takes of. axes: of the model."""
        names = [f"{name}.weight" for name in self.linears] if self.weights < 1 else []
        for share, kind in self._units:
            names += owned([axis for axis in axes if axis.kind == kind]) if share < 1 else []
        return list(dict.fromkeys(names))

    def prune_(self, rounded: QuantisedModel, axes: Sequence[Axis]) -> None:
        """Leave out what does not stay, of the model."""
        for share, kind in self._units:
            if share < 1:
                rounded.keep_(unit_masks(_left(rounded), [axis for axis in axes if axis.kind == kind], share))
        if self.weights < 1:
            names = [f"{name}.weight" for name in self.linears]
            rounded.keep_(weight_masks(_left(rounded), names, self.weights))

    def gone(self, rounded: QuantisedModel) -> float:
        """The share of the linears' weights that has left."""
        kept, names = rounded.kept(), [f"{name}.weight" for name in self.linears]
        gone = sum(int((~kept[name]).sum()) for name in names if name in kept)
        return gone / sum(rounded.full[name].numel() for name in names)

    @property
    def _units(self) -> tuple[tuple[float, Kind], ...]:
        return (self.heads, Kind.HEAD), (self.channels, Kind.CHANNEL)


def _left(rounded: QuantisedModel) -> Mapping[str, Tensor]:
    """The full tensors with 0 for what has left."""
    kept = rounded.kept()
    return {name: full * kept[name] if name in kept else full for name, full in rounded.full.items()}
