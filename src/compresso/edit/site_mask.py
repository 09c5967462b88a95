"""A mask as sites multiply it into activations, of whatever type these are.

Unusual: masks are float32 or wider, and activations may be half as wide. A mask is then rounded once for all sites that
share it, not once at each, and its gradient is summed over tokens in its own type. On a GPU that launches kernels one
by one for few tokens, this takes four of them a site and step where autograd's own product of the two takes six.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SiteMask:
    """The product of all masks at a site, or at several where the same one acts.

    Args:
        values: [width of the activation], [1], or these with [batch, 1, ...] in front; float32 or wider.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._rounded: dict[tuple[torch.dtype, torch.device, bool], Tensor] = {}

    def times(self, activation: Tensor) -> Tensor:
        """An activation times the mask. OPT's FFN sees examples and positions as one dimension: [batch * seq, width]
        meets [batch, 1, width]; MobileViT's sees each example as several: [batch * parts, seq, width].
        """
        mask = self.values
        if mask.dim() == activation.dim() + 1:
            return (activation.unflatten(0, (mask.shape[0], -1)) * mask.to(activation)).flatten(0, 1)
        if mask.dim() == activation.dim() and 1 < mask.shape[0] < len(activation):
            mask = mask.repeat_interleave(len(activation) // mask.shape[0], 0)
            return activation * mask.to(activation)
        if (mask.dtype, mask.device) == (activation.dtype, activation.device):
            return activation * mask
        rounded = self._as(activation)
        if not (mask.requires_grad and torch.is_grad_enabled()):
            return activation * rounded
        return cast(Tensor, _Product.apply(activation, mask, rounded))  # pyright: ignore[reportUnknownMemberType]

    def _as(self, activation: Tensor) -> Tensor:
        """The values in an activation's type and place, without gradient."""
        how = (activation.dtype, activation.device, torch.is_inference_mode_enabled())
        if how not in self._rounded:
            self._rounded[how] = self.values.detach().to(activation)
        return self._rounded[how]


class _Product(torch.autograd.Function):
    """activation x rounded, whose gradient of `rounded` is that of `mask`."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, mask: Tensor, rounded: Tensor) -> Tensor:
        ctx.save_for_backward(activation, rounded)
        ctx.mask = mask.shape, mask.dtype, mask.device
        return activation * rounded

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outgoing: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        activation, rounded = ctx.saved_tensors
        shape, dtype, device = ctx.mask
        (gradient,) = outgoing
        to_activation = gradient * rounded if ctx.needs_input_grad[0] else None
        to_mask = None
        if ctx.needs_input_grad[1]:
            product = gradient * activation
            leading = product.dim() - len(shape)
            summed = [*range(leading), *(leading + i for i, n in enumerate(shape) if n == 1)]
            if summed:
                product = product.sum(summed, dtype=torch.promote_types(product.dtype, dtype)).reshape(shape)
            to_mask = product.to(device, dtype)
        return to_activation, to_mask, None
