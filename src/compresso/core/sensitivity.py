"""How much the loss would change without a unit, read off each training step: HomoDistil's importance (Liang et al.,
arXiv 2302.09632, section 3.2).

The sensitivity of an entry is |theta dL/dtheta|, the size of the first-order change of the loss when it becomes 0. A
unit's is the sum over all entries that leave with it: coupled matrices, biases and norms share one score. Unlike the
saliences of `core/saliency.py`, which look at a dense model once, these are taken at every update of a training and of
its whole loss; single batches are noisy, so that a moving average of them ranks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compresso.core.axis import Axis


@torch.no_grad()
def sensitivities(
    axes: Sequence[Axis], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The sensitivity of each unit: axis name -> [size], float64, not negative.

    Args:
        axes: whose units tile their tensors (heads, channels, hidden dimensions).
        weights: parameter name -> its entries.
        gradients: likewise, of those parameters that have one; others count for nothing.

    >>> from compresso.core.axis import Kind, Slice
    >>> axis = Axis("a", Kind.CHANNEL, 2, (Slice("w", 0), Slice("v", 1)), (), "")
    >>> of = {"w": torch.tensor([[1.0, -2.0], [3.0, 0.0]]), "v": torch.tensor([[1.0, 1.0]])}
    >>> sensitivities([axis], of, {"w": torch.ones(2, 2), "v": torch.tensor([[0.0, -5.0]])})
    {'a': tensor([3., 8.], dtype=torch.float64)}
    """
    found: dict[str, Tensor] = {}
    owners: dict[str, list[tuple[Axis, int]]] = {}
    for axis in axes:
        for i, piece in enumerate(axis.slices):
            owners.setdefault(piece.param, []).append((axis, i))
    for name, gradient in gradients.items():
        if name not in owners:
            continue
        sizes = (weights[name] * gradient).abs()  # once for all axes that share the tensor
        for axis, i in owners[name]:
            here = axis.slices[i].entries(sizes, axis.size).sum(-1, dtype=torch.float64)
            found[axis.name] = found[axis.name] + here if axis.name in found else here
    device = next((one.device for one in found.values()), torch.device("cpu"))
    return {
        axis.name: found.get(axis.name, torch.zeros(axis.size, dtype=torch.float64, device=device)) for axis in axes
    }
