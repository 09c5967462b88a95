"""Masks as sites multiply them into activations, of whatever type these are.

Unusual: masks are float32 or wider, and activations under autocast half as wide. The masks of all sites are then
rounded in one go when they are set, a copy for each site: their gradients are rounded as the activations' are, and
added up in the masks' own type. For LLaMA-7B that is one cast and its gradient in place of 161, for which a GPU that is
given few tokens waits one by one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from compresso.core.axis import Axis, Gate
from compresso.errors import nearest


@dataclass(frozen=True, eq=False)
class SiteMask:
    """The product of all masks at a site.

    Args:
        values: [width of the activation], [1], or these with [batch, 1, ...] in front; float32 or wider.
        rounded: the same in the type that activations are expected to have, with the same gradient; None where no other
            is expected.
    """

    values: Tensor
    rounded: Tensor | None = None

    def times(self, activation: Tensor) -> Tensor:
        """An activation times the mask. OPT's FFN sees examples and positions as one dimension: [batch * seq, width]
        meets [batch, 1, width]; MobileViT's sees each example as several: [batch * parts, seq, width].
        """
        fits = self.rounded is not None and self.rounded.dtype == activation.dtype
        mask = self.rounded if fits and self.rounded is not None else self.values
        if mask.dim() == activation.dim() + 1:
            return (activation.unflatten(0, (mask.shape[0], -1)) * mask.to(activation)).flatten(0, 1)
        if mask.dim() == activation.dim() and 1 < mask.shape[0] < len(activation):
            mask = mask.repeat_interleave(len(activation) // mask.shape[0], 0)
        return activation * mask.to(activation)

    @property
    def expected(self) -> Tensor:
        """What a product with an activation of the expected type takes; its gradient goes on to that of `values`."""
        return self.values if self.rounded is None else self.rounded


def site_masks(axes: Sequence[Axis], masks: Mapping[str, Tensor]) -> dict[tuple[str, str], SiteMask]:
    """For each (module, side) the product of all masks there, shaped to broadcast against [batch, seq, width].

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
    sites: dict[tuple[str, str], Tensor] = {}
    for axis, spread in _spread([(by_name[name], mask) for name, mask in wide.items()]):
        for gate in axis.gates:
            site, values = (gate.module, gate.side), spread[_how(gate)]
            sites[site] = sites[site] * values if site in sites else values
    rounded = _rounded(sites)
    return {site: SiteMask(values, rounded.get(site)) for site, values in sites.items()}


def _rounded(sites: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
    """The masks of all sites in the type that autocast gives activations; none where it is off, where masks lie on
    several devices, and where a gradient would be lost: in a mode without, for masks that want one.
    """
    devices = {values.device for values in sites.values()}
    learn = any(values.requires_grad for values in sites.values())
    if len(devices) != 1 or torch.is_inference_mode_enabled() or (learn and not torch.is_grad_enabled()):
        return {}
    (device,) = devices
    if not torch.is_autocast_enabled(device.type):
        return {}
    alike: dict[int, list[tuple[str, str]]] = {}
    for site, values in sites.items():
        alike.setdefault(id(values), []).append(site)
    order = [site for same in alike.values() for site in same]
    pieces: list[Tensor] = []
    for same in alike.values():
        values, n = sites[same[0]], len(same)
        # the gradients of many copies are added up in one sum, those of two in one sum as well
        pieces += [values.expand(n, *values.shape).flatten()] if n > 2 else [values.flatten()] * n
    flat = torch.cat(pieces).to(torch.get_autocast_dtype(device.type))
    parts = flat.split([sites[site].numel() for site in order])
    return {site: part.view(sites[site].shape) for site, part in zip(order, parts, strict=True)}


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
