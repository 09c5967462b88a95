"""Whole layers as units in models that have no axis of them, because norms lie behind the residual sums (BERT).

There a layer whose sub-layers add nothing still normalises, so no mask on sub-layers is its removal, and axes, budgets
and scores name none. A stage that is told which layers stay needs no score: for it a layer is masked by being skipped,
out = mask x layer(in) + (1 - mask) x in, which a mask of 0 or 1 says exactly and no weight can hold by halves.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Gate, Kind, Slice

NAME = "layers"


def with_layers(axes: Sequence[Axis], arch: Arch, model: PreTrainedModel) -> tuple[Axis, ...]:
    """The same axes, and behind them that of whole layers where there is none.

    Args:
        axes: of the model.
        arch, model: the model; on any device, meta included.
    """
    if any(axis.kind == Kind.LAYER for axis in axes):
        return tuple(axes)
    blocks = arch.blocks(model)
    where = next(name for name, module in model.named_modules() if module is blocks)
    slices = tuple(
        Slice(name, 0, unit=i)
        for i, block in enumerate(blocks)
        for name, _ in block.named_parameters(prefix=f"{where}.{i}")
    )
    gates = tuple(Gate(f"{where}.{i}", "skip", unit=i) for i in range(len(blocks)))
    return (*axes, Axis(NAME, Kind.LAYER, len(blocks), slices, gates, where))
