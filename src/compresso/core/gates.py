"""All learned gates of a model as one parameter.

One flat log-alpha [n_gates] instead of one tensor per layer: one sampling, one optimizer step and one clamp an update,
whatever the depth.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from compresso.core import hard_concrete
from compresso.core.axis import Axis


class Gates(nn.Module):
    """Hard-concrete gates (Louizos et al., arXiv 1712.01312), one per unit of each axis.

    Args:
        axes: what is gated, in a fixed order.
        initial: axis name -> log-alpha [size].
    """

    def __init__(self, axes: Sequence[Axis], initial: Mapping[str, Tensor]) -> None:
        """Check the initial values and make one parameter of them.

        Raises:
            ValueError: an axis has no or a wrongly shaped initial value.
        """
        super().__init__()
        for axis in axes:
            if axis.name not in initial or tuple(initial[axis.name].shape) != (axis.size,):
                raise ValueError(
                    f"gates of {axis.name} want initial log-alpha [{axis.size}], got"
                    f" {tuple(initial.get(axis.name, torch.empty(0)).shape)}"
                )
        self.axes = tuple(axes)
        self.log_alpha = nn.Parameter(torch.cat([initial[axis.name].float().flatten() for axis in axes]))

    def __len__(self) -> int:
        """How many gates there are."""
        return sum(axis.size for axis in self.axes)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views by axis of a tensor [..., n_gates]: axis name -> [..., size]."""
        parts = torch.split(flat, [axis.size for axis in self.axes], dim=-1)
        return {axis.name: part for axis, part in zip(self.axes, parts, strict=True)}

    def keep_probabilities(self) -> dict[str, Tensor]:
        """P(z > 0) by axis, with gradients."""
        return self.split(hard_concrete.keep_probability(self.log_alpha))

    def sample(self, u: Tensor) -> dict[str, Tensor]:
        """Masks by axis from uniform noise u [n_gates] or [batch, n_gates]."""
        return self.split(hard_concrete.sample(self.log_alpha, u))

    def values(self) -> dict[str, Tensor]:
        """Detached log-alpha by axis, whole also where it is sharded over processes (a collective then)."""
        flat = self.log_alpha.detach()
        return self.split(flat.full_tensor() if isinstance(flat, DTensor) else flat)

    @torch.no_grad()
    def shift_(self, shift: Tensor | float) -> None:
        """Add to every log-alpha (a scalar, or [n_gates]) and clamp to the published range."""
        if isinstance(self.log_alpha, DTensor) and isinstance(shift, Tensor) and shift.dim():
            shift = distribute_tensor(shift, self.log_alpha.device_mesh, self.log_alpha.placements)
        self.log_alpha.add_(shift)
        hard_concrete.clamp_(self.log_alpha)
