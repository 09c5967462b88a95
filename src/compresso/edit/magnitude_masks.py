"""Which weights, FFN channels and heads stay, by magnitude: masks that a rounding is taken behind.

As in DeepSpeed's compression library, ceil(share n) of n stay: of each matrix the largest weights; of each FFN the
channels whose incoming rows have the largest sum of |w|; of each attention the heads whose columns of the output
projection have. What left before counts as 0. Of equals the first stay.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind, Slice

Full = Mapping[str, Tensor]
"""Parameter name -> its full values, those that left as 0."""


def weight_masks(full: Full, names: Sequence[str], share: float) -> dict[str, Tensor]:
    """Of each tensor, True where one of its ceil(share n) largest magnitudes is."""
    return {name: _largest(full[name].detach().abs().flatten(), share).view_as(full[name]) for name in names}


def unit_masks(full: Full, axes: Sequence[Axis], share: float) -> dict[str, Tensor]:
    """Of each tensor that heads or channels own entries of, False where those of a unit that leaves are.

    Args:
        full: of all parameters that the axes name.
        axes: of heads and channels.
        share: of the units of each axis that stays; never fewer than the axis has to keep.
    """
    masks: dict[str, Tensor] = {}
    for axis in axes:
        scores = torch.stack(
            [piece.entries(full[piece.param].detach().abs(), axis.size).sum(dim=1) for piece in scored(axis)]
        ).sum(dim=0)
        kept = _largest(scores, share, axis.fewest)
        for (name, dim), pieces in axis.tilings().items():
            mask = masks.setdefault(name, torch.ones_like(full[name], dtype=torch.bool))
            for piece in pieces:
                here = kept.repeat_interleave(piece.width)
                shape = [len(here) if d == dim else 1 for d in range(mask.dim())]
                mask.narrow(dim, piece.start, len(here)).logical_and_(here.reshape(shape))
    return masks


def scored(axis: Axis) -> list[Slice]:
    """The entries whose magnitude ranks an axis' units: what writes channels, what reads heads."""
    written, read = ends(axis)
    return read if axis.kind == Kind.HEAD else written


def ends(axis: Axis) -> tuple[list[Slice], list[Slice]]:
    """The matrices that write an axis' units, and those that read them."""
    weights = [piece for piece in axis.slices if piece.param.endswith(".weight")]
    gated = {(f"{gate.module}.weight", gate.side) for gate in axis.gates}
    outputs = any(side == "output" for _, side in gated)
    written = [p for p in weights if ((p.param, "output") in gated if outputs else (p.param, "input") not in gated)]
    return written, [piece for piece in weights if piece not in written]


def owned(axes: Sequence[Axis]) -> list[str]:
    """The parameters that units of these axes own entries of."""
    return list(dict.fromkeys(name for axis in axes for name, _ in axis.tilings()))


def _largest(values: Tensor, share: float, fewest: int = 0) -> Tensor:
    """True at the largest ceil(share n) of values [n]."""
    kept = max(math.ceil(share * len(values)), fewest)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.argsort(descending=True, stable=True)[:kept]] = True
    return mask
