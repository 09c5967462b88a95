"""What can be removed from a network, and which tensor entries leave with it.

An `Axis` is a set of units (heads, FFN channels, hidden dimensions, layers, tokens) whose tensor entries must leave
together. It is plain data: an architecture writes its axes down once, and masking, counting, shrinking and planning are
all derived from them.

Two ways a unit owns entries of a tensor:

    unit=None   the units lie side by side along `dim`, `width` entries each: unit u owns [start + u * width, start + (u
                + 1) * width)
    unit=k      the whole tensor belongs to unit k (a layer's matrices belong to unit k of the layer axis)

An axis may lie within one unit of another: the query heads that share a key/value head. Then both own entries of one
dimension, and what stays of it is what both keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Literal

from torch import Tensor
from torch.nn.functional import pad


class Kind(StrEnum):
    """The kinds of unit that can be removed."""

    HEAD = "head"
    """A key/value head together with the query heads that share it."""
    QUERY = "query"
    """One of the query heads that share a key/value head; all key/value heads of a layer keep as many."""
    HEAD_CHANNEL = "head_channel"
    """One channel inside a head, of its queries and keys or of its values; all heads of a layer keep as many of both.
    """
    CHANNEL = "channel"
    """One unit of an FFN's intermediate width, or one channel inside an inverted residual."""
    EXPERT = "expert"
    """One routed expert of a layer: its part of the fused tensors, and what the router knows of it."""
    EXPERT_CHANNEL = "expert_channel"
    """One unit of the intermediate width of every expert of a layer, which all keep as many."""
    HIDDEN = "hidden"
    """One dimension of the residual stream; a model has one such axis. In a network of stages, one channel of a stage's
    feature maps; each stage has one.
    """
    LAYER = "layer"
    """A whole decoder layer."""
    ATTENTION = "attention"
    """The attention sub-layer of a layer, with its norm."""
    MLP = "mlp"
    """The FFN sub-layer of a layer, with its norm."""
    VOCAB = "vocab"
    """One token: its row of the embedding and of the head.
    The others are renumbered, and the tokenizer has to follow.
    """


@dataclass(frozen=True, slots=True)
class Slice:
    """The entries of one parameter that belong to an axis' units.

    Args:
        param: qualified parameter name, as in `model.named_parameters()`.
        dim: tensor dimension along which the units lie (0 where `unit` is given and the dimension has no meaning).
        width: entries of one unit along `dim`.
        unit: None if the units tile `dim`; k if the whole tensor belongs to unit k.
        start: where the first unit's entries begin. Several slices of one axis together tile a dimension in which a
            fused projection holds q, k and v, or gate and up, one behind the other.
    """

    param: str
    dim: int
    width: int = 1
    unit: int | None = None
    start: int = 0

    def entries(self, tensor: Tensor, size: int) -> Tensor:
        """The entries of each unit [size, entries of one], from a tensor of the parameter's shape; for slices whose
        units tile `dim`.
        """
        return tensor.narrow(self.dim, self.start, size * self.width).movedim(self.dim, 0).reshape(size, -1)


@dataclass(frozen=True, slots=True)
class Gate:
    """Where a mask multiplies activations: the last dimension of a module's input or output, of a convolution's input
    the channels; or a module that a mask of 0 skips; or the choice among experts.

    Args:
        module: qualified module name; a Linear, or an Embedding with side "output".
        side: "input" or "output" of that module; "skip" where its output becomes mask x output + (1 - mask) x input;
            "route" of a router, where 0 is minus infinity before the choice of the top k and other values multiply
            what is chosen; "weights" where no module shows the activation, so that the mask multiplies the entries of
            `folds` while the module runs.
        width: consecutive activation entries that share one unit's mask value.
        unit: None if the units tile the activation; k if the whole activation belongs to unit k.
        start: where the first unit's entries begin.
        of: entries of the activation, where the units tile only a part of it; None where they tile all of it.
        folds: (parameter, dim) of the entries that take a soft mask in when it is made permanent, where these are not
            the module's own parameters.
    """

    module: str
    side: Literal["input", "output", "skip", "route", "weights"]
    width: int = 1
    unit: int | None = None
    start: int = 0
    of: int | None = None
    folds: tuple[tuple[str, int], ...] = ()

    def spread(self, mask: Tensor) -> Tensor:
        """A mask [..., size] as it multiplies the activation: [..., entries], or [..., 1] where one unit owns all."""
        if self.unit is not None:
            return mask[..., self.unit : self.unit + 1]
        values = mask if self.width == 1 else mask.repeat_interleave(self.width, dim=-1)
        if self.of is None:
            return values
        return pad(values, (self.start, self.of - self.start - values.shape[-1]), value=1.0)

    def entries(self, values: Tensor, size: int) -> Tensor:
        """The values of each unit [size, width], from those of the activation's entries [entries]; for gates whose
        units tile.
        """
        return values.narrow(0, self.start, len(values) if self.of is None else size * self.width).reshape(size, -1)


@dataclass(frozen=True, slots=True)
class Axis:
    """Units that can be removed one by one, and everything that leaves with each.

    Args:
        name: unique in the model and readable: `layers.3.heads`, `layers.3.heads.1.queries`,
            `layers.3.heads.1.matches`, `layers.3.heads.1.values`, `layers.3.channels`, `hidden`, `layers`, `attention`,
            `mlp`, `vocab`.
        kind: what a unit is.
        size: number of units.
        slices: parameter entries owned by the units.
        gates: places where a mask on the units is applied; their product with a 0/1 mask must equal removal. None for
            tokens: a model that is never given a removed token and whose logits of removed tokens are passed over is
            the smaller one already.
        container: qualified name of the module whose shape fields describe this axis (the attention of a head axis, the
            FFN of a channel axis, the layer list of a layer, attention or mlp axis, the decoder of the hidden axis).
        layer: index of the layer the axis lies in; None for axes of the whole model.
        with_last_unit: parameters removed when no unit remains (the norm before an attention that has no heads).
        min_units: fewest units that may be kept. 1 where a bias would survive the removal of the last unit.
        norms: RMSNorm modules whose mean runs over this axis. Masked training keeps dividing by the original size, so
            removal scales their weight by sqrt(size / kept) and their eps by size / kept.
        head_norm: the RMSNorm read only by a head tied to the embedding. A soft mask folded into the embedding must be
            divided out there.
        layer_norms: LayerNorm modules whose mean and variance run over this axis. A mask leaves units at 0 out of both,
            as removal does, so that nothing has to be corrected; gates lie on their outputs.
        within: the axis, and the unit of it, that these units lie in; None for most. They leave with that unit, and all
            units of that axis that stay keep the same number of theirs.
        groups: runs of units, equally long, that keep as many each (experts under a router that chooses groups first).
        buffers: persistent buffers with one entry a unit along their first dimension, which are cut with them.
        rooted: entries of what is divided by the root of this axis' width (the queries of an attention whose heads get
            narrower). Masked training divides by that of the original, so removal scales them by sqrt(kept / size).
    """

    name: str
    kind: Kind
    size: int
    slices: tuple[Slice, ...]
    gates: tuple[Gate, ...]
    container: str
    layer: int | None = None
    with_last_unit: tuple[str, ...] = ()
    min_units: int = 0
    norms: tuple[str, ...] = ()
    head_norm: str | None = None
    within: tuple[str, int] | None = None
    layer_norms: tuple[str, ...] = ()
    groups: int = 1
    buffers: tuple[str, ...] = ()
    rooted: tuple[Slice, ...] = ()

    def tilings(self) -> dict[tuple[str, int], list[Slice]]:
        """(parameter, dimension) -> the slices that tile it, in order of their start."""
        found: dict[tuple[str, int], list[Slice]] = {}
        for piece in self.slices:
            if piece.unit is None:
                found.setdefault((piece.param, piece.dim), []).append(piece)
        return {key: sorted(pieces, key=lambda piece: piece.start) for key, pieces in found.items()}

    def tiles(self, pieces: Sequence[Slice], length: int) -> bool:
        """Whether slices, in order, fill a dimension of this length without a gap and without an overlap; those of an
        axis within another need only fit into it.
        """
        if self.within is not None:
            edges = [edge for piece in pieces for edge in (piece.start, piece.start + self.size * piece.width)]
            return edges == sorted(edges) and edges[0] >= 0 and edges[-1] <= length
        ends = list(accumulate(self.size * piece.width for piece in pieces))
        return [piece.start for piece in pieces] == [0, *ends[:-1]] and ends[-1] == length

    @property
    def fewest(self) -> int:
        """Fewest units that may be kept: `min_units`, and at least one hidden dimension, one layer and one token."""
        return max(self.min_units, 1) if self.kind in (Kind.HIDDEN, Kind.LAYER, Kind.VOCAB) else self.min_units
