"""Multiplies masks into a model's activations for as long as a context lasts, without touching a parameter.

This is the common ground of learned masks, search over masks and measuring before cutting: with 0/1 masks the model computes exactly what
`shrink_` would leave. Masks of several axes that meet at one site are multiplied once on entry, so a call costs one product a site.

Gradient checkpointing runs the forward again inside `backward`, and the hooks must still be there: call `backward` inside the context.
(Outside, torch notices the different graph and raises CheckpointError.)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresso.core.axis import Axis, Gate
from compresso.errors import nearest


@contextmanager
def gated(model: nn.Module, axes: Sequence[Axis], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, activations are multiplied by masks at the axes' gates; gradients flow into the masks.

    Args:
        model: the model that the axes describe, or a PEFT wrapper of it.
        axes: from `Arch.axes`.
        masks: axis name -> [size], or [batch, size] with one row an example; any floating dtype, cast to the activation's at use.
            Axes without a mask are left alone.

    Raises ValueError for an unknown axis and for masks of the wrong shape or dtype.

    Example:
        with gated(model, axes, {"layers.0.heads": mask}):
            loss = model(**batch).loss
            loss.backward()
    """
    sites = _site_masks(axes, masks)
    unwrap = getattr(model, "get_base_model", None)  # of a PeftModel; its linears then are adapter layers, which take the same hooks
    base: nn.Module = unwrap() if unwrap is not None else model
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for (name, side), mask in sites.items():
            module = base.get_submodule(name)
            if side == "input":
                handles.append(module.register_forward_pre_hook(_scale_input(mask)))
            else:
                handles.append(module.register_forward_hook(_scale_output(mask)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _site_masks(axes: Sequence[Axis], masks: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """For each (module, side) the product of all masks there, shaped to broadcast against [batch, seq, width]."""
    by_name = {axis.name: axis for axis in axes}
    sites: dict[tuple[str, str], Tensor] = {}
    batches: dict[int, str] = {}
    for name, mask in masks.items():
        if name not in by_name:
            raise ValueError(f"no axis is named '{name}'; {nearest(name, by_name)}")
        axis = by_name[name]
        if not mask.is_floating_point() or mask.dim() not in (1, 2) or mask.shape[-1] != axis.size:
            raise ValueError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}, wanted floating [{axis.size}] or [batch, {axis.size}]"
            )
        if mask.dim() == 2:
            batches.setdefault(mask.shape[0], name)
            if len(batches) > 1:
                raise ValueError(f"masks disagree on the batch: {', '.join(f'{axis} has {size} rows' for size, axis in batches.items())}")
        wide = mask.to(torch.promote_types(mask.dtype, torch.float32))  # products of half-precision masks would be rounded twice
        for gate in axis.gates:
            values, site = _values(gate, wide), (gate.module, gate.side)
            sites[site] = sites[site] * values if site in sites else values
    return sites


def _values(gate: Gate, mask: Tensor) -> Tensor:
    """A mask as one gate multiplies it: [width of the activation], [1], or these with [batch, 1, ...] in front."""
    if gate.unit is not None:
        values = mask[..., gate.unit : gate.unit + 1]
    else:
        values = mask if gate.width == 1 else mask.repeat_interleave(gate.width, dim=-1)
    return values.unsqueeze(1) if mask.dim() == 2 else values


def _scale_input(mask: Tensor) -> Any:
    """A forward pre-hook that multiplies the first input."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * mask.to(inputs[0]), *inputs[1:])

    return hook


def _scale_output(mask: Tensor) -> Any:
    """A forward hook that multiplies the output."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * mask.to(output)

    return hook
