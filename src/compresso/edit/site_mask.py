"""A mask as sites multiply it into activations, of whatever type these are.

Unusual: masks are float32 or wider, and activations may be half as wide. A mask is then rounded once for all sites that
share it, not once at each, and its gradient is summed over tokens in its own type. On a GPU that launches kernels one
by one for few tokens, this takes four of them a site and step where autograd's own product of the two takes six.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compresso.core.axis import Axis, Gate
from compresso.errors import nearest


class Together:
    """Masks that are set at once, and rounded at once when the first of them is wanted in another type."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._rounded: dict[tuple[int, torch.dtype, torch.device, bool], Tensor] = {}

    def add(self, values: Tensor) -> int:
        """Take a mask, and say by which number it is known."""
        self._values.append(values.detach())
        return len(self._values) - 1

    def rounded(self, number: int, activation: Tensor) -> Tensor:
        """A mask in an activation's type and place, without gradient."""
        how = (activation.dtype, activation.device, torch.is_inference_mode_enabled())
        if (number, *how) not in self._rounded:
            here = [i for i, one in enumerate(self._values) if one.device == self._values[number].device]
            values = [self._values[i] for i in here]
            flat = torch.cat([one.flatten() for one in values]).to(activation)
            for i, one, part in zip(here, values, flat.split([one.numel() for one in values]), strict=True):
                self._rounded[i, *how] = part.view(one.shape)
        return self._rounded[number, *how]


class SiteMask:
    """The product of all masks at a site, or at several where the same one acts.

    Args:
        values: [width of the activation], [1], or these with [batch, 1, ...] in front; float32 or wider.
        together: those that are set with it.
    """

    def __init__(self, values: Tensor, together: Together | None = None) -> None:
        self.values = values
        self._together = Together() if together is None else together
        self._number = self._together.add(values)

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
        rounded = self._together.rounded(self._number, activation)
        if not (mask.requires_grad and torch.is_grad_enabled()):
            return activation * rounded
        return cast(Tensor, _Product.apply(activation, mask, rounded))  # pyright: ignore[reportUnknownMemberType]


def site_masks(axes: Sequence[Axis], masks: Mapping[str, Tensor]) -> dict[tuple[str, str], SiteMask]:
    """For each (module, side) the product of all masks there, shaped to broadcast against [batch, seq, width]; sites at
    which the same one acts share it.

    Raises:
        ValueError: an unknown axis and for masks of the wrong shape or dtype.
    """
    by_name = {axis.name: axis for axis in axes}
    batches: dict[int, str] = {}
    wide: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if name not in by_name:
            raise ValueError(f"no axis is named '{name}'; {nearest(name, by_name)}")
        axis = by_name[name]
        if not mask.is_floating_point() or mask.dim() not in (1, 2) or mask.shape[-1] != axis.size:
            raise ValueError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}, wanted floating [{axis.size}] or [batch,"
                f" {axis.size}]"
            )
        if mask.dim() == 2:
            batches.setdefault(mask.shape[0], name)
            if len(batches) > 1:
                raise ValueError(
                    "masks disagree on the batch:"
                    f" {', '.join(f'{axis} has {size} rows' for size, axis in batches.items())}"
                )
        # products of half-precision masks would be rounded twice
        wide[name] = mask.to(torch.promote_types(mask.dtype, torch.float32))
    sites: dict[tuple[str, str], SiteMask] = {}
    together = Together()
    for axis, spread in _spread([(by_name[name], mask) for name, mask in wide.items()]):
        alike = {how: SiteMask(values, together) for how, values in spread.items()}
        for gate in axis.gates:
            site, mask = (gate.module, gate.side), alike[_how(gate)]
            sites[site] = SiteMask(sites[site].values * mask.values, together) if site in sites else mask
    return sites


_How = tuple[int, int | None, int, int | None]
"""How a gate spreads a mask: its width, unit, start and of."""


def _how(gate: Gate) -> _How:
    return gate.width, gate.unit, gate.start, gate.of


def _spread(masks: Sequence[tuple[Axis, Tensor]]) -> list[tuple[Axis, dict[_How, Tensor]]]:
    """Each mask as the gates of its axis multiply it. Those of which every value is repeated are spread at once, where
    they are as many: heads of all layers.
    """
    found: list[tuple[Axis, dict[_How, Tensor]]] = []
    repeated: dict[tuple[object, ...], list[tuple[dict[_How, Tensor], _How, Tensor]]] = {}
    for axis, mask in masks:
        spread: dict[_How, Tensor] = {}
        for gate in axis.gates:
            if (how := _how(gate)) in spread:
                continue
            spread[how] = mask
            if gate.width > 1 and how[1:] == (None, 0, None):
                repeated.setdefault((gate.width, mask.shape, mask.dtype, mask.device), []).append((spread, how, mask))
            else:
                spread[how] = _values(gate, mask)
        found.append((axis, spread))
    for (width, *_), alike in repeated.items():
        stacked = torch.stack([mask for *_, mask in alike]).repeat_interleave(cast(int, width), dim=-1)
        for (spread, how, mask), values in zip(alike, stacked.unbind(), strict=True):
            spread[how] = values.unsqueeze(1) if mask.dim() == 2 else values
    return found


def _values(gate: Gate, mask: Tensor) -> Tensor:
    """A mask as one gate multiplies it: [width of the activation], [1], or these with [batch, 1, ...] in front."""
    values = gate.spread(mask)
    return values.unsqueeze(1) if mask.dim() == 2 else values


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
