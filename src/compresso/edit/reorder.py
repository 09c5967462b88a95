"""Units of an axis in another order: every tensor that knows them is reordered with them, so that the model computes
the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compresso.core.axis import Axis


@torch.no_grad()
def reorder_(model: nn.Module, axis: Axis, order: Tensor | Sequence[int]) -> None:
    """Put unit order[i] in the place of unit i, in place; for axes whose units tile their tensors.

    Raises:
        ValueError: the order does not name every unit once.
    """
    units = torch.as_tensor(order, dtype=torch.long).cpu()
    if sorted(units.tolist()) != list(range(axis.size)):
        raise ValueError(f"the order of {axis.name} does not name each of its {axis.size} units once")
    for (name, dim), pieces in axis.tilings().items():
        parameter = model.get_parameter(name)
        places = torch.arange(parameter.shape[dim])
        for piece in pieces:
            unordered = places[piece.start : piece.start + axis.size * piece.width].reshape(axis.size, -1)
            places[piece.start : piece.start + axis.size * piece.width] = unordered[units].flatten()
        parameter.copy_(parameter.index_select(dim, places.to(parameter.device)))
