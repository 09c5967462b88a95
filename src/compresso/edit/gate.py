"""Multiplies masks into a model's activations for as long as a context lasts, without touching a parameter.

A LayerNorm over units that a mask may leave out takes its mean and variance over the others, as the smaller model does.

This is the common ground of learned masks, search over masks and measuring before cutting: with 0/1 masks the model
computes exactly what `shrink_` would leave. Masks of several axes that meet at one site are multiplied once on entry,
so a call costs one product a site.

Gradient checkpointing runs the forward again inside `backward`, and the hooks must still be there: call `backward`
inside the context. (Outside, torch notices the different graph and raises CheckpointError.)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresso.core.axis import Axis, Gate
from compresso.edit.expert_gates import routed, run_with
from compresso.edit.site_mask import SiteMask, site_masks


class GateSites:
    """The places of a model where masks are multiplied in. Made by `gated`; `set` changes the masks while the context
    lasts.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        """axes: those whose gates are hooked."""
        self._axes = axes
        self._masks: dict[tuple[str, str], SiteMask] = {}
        self._kept: dict[str, Tensor] = {}

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Use these masks from the next forward pass on; a backward pass that recomputes activations must come before
        the next `set`.

        Raises:
            ValueError: an unknown axis and for masks of the wrong shape or dtype.
        """
        self._masks = site_masks(self._axes, masks)
        self._kept = {
            norm: kept
            for axis in self._axes
            if (kept := _some_left_out(axis, masks)) is not None
            for norm in axis.layer_norms
        }

    def over_kept(self, name: str) -> Any:
        """A forward hook that computes a LayerNorm over the units that a mask keeps, if it leaves some out."""

        def hook(norm: nn.LayerNorm, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            kept = self._kept.get(name)
            return None if kept is None else _normed(norm, inputs[0], kept).to(output.dtype)

        return _known(hook, lambda: None)

    def scale_input(self, site: tuple[str, str]) -> Any:
        """A forward pre-hook that multiplies the first input by the mask at a site, if there is one."""

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            mask = self._masks.get(site)
            if mask is None:
                return None
            times = _times_channels(inputs[0], mask.values) if isinstance(module, nn.Conv2d) else mask.times(inputs[0])
            return (times, *inputs[1:])

        return _known(hook, lambda: self._masks.get(site))

    def scale_output(self, site: tuple[str, str]) -> Any:
        """A forward hook that multiplies the output by the mask at a site, if there is one."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            mask = self._masks.get(site)
            if mask is None:
                return None
            if isinstance(output, tuple):
                return (mask.times(output[0]), *output[1:])
            return mask.times(output)

        return _known(hook, lambda: self._masks.get(site))

    def skip(self, site: tuple[str, str]) -> Any:
        """A forward hook that mixes the output with the input by the mask at a site, if there is one."""

        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            mask = self._masks.get(site)
            if mask is None:
                return None
            given: Tensor = inputs[0] if inputs else named["hidden_states"]
            made: Tensor = output[0] if isinstance(output, tuple) else output
            mixed = mask.times(made) + SiteMask(1 - mask.values).times(given)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return _known(hook, lambda: self._masks.get(site))

    def route(self, site: tuple[str, str]) -> Any:
        """A forward hook that has a router choose under the mask at a site, if there is one."""

        def hook(router: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
            mask = self._masks.get(site)
            return None if mask is None else routed(router, output, mask.values)

        return _known(hook, lambda: self._masks.get(site))

    def weighted(self, module: nn.Module, gate: Gate) -> Any:
        """A forward of a module whose parameters take in the mask of a gate, if there is one."""
        forward, site = module.forward, (gate.module, gate.side)
        folds = [(name.removeprefix(f"{gate.module}."), dim) for name, dim in gate.folds]

        def masked(*arguments: Any, **named: Any) -> Any:
            mask = self._masks.get(site)
            if mask is None:
                return forward(*arguments, **named)
            return run_with(module, forward, folds, mask.values, arguments, named)

        return masked


def _known(hook: Any, site_mask: Callable[[], SiteMask | None]) -> Any:
    """A hook that says which mask it multiplies in, for blocks that are replayed."""
    hook.site_mask = site_mask
    return hook


@contextmanager
def gated(model: nn.Module, axes: Sequence[Axis], masks: Mapping[str, Tensor]) -> Iterator[GateSites]:
    """Within the context, activations are multiplied by masks at the axes' gates; gradients flow into the masks.

    Args:
        model: the model that the axes describe, or a PEFT wrapper of it.
        axes: from `Arch.axes`.
        masks: axis name -> [size], or [batch, size] with one row an example; any floating dtype, cast to the
            activation's at use. Axes without a mask are not touched.

    Yields the sites, whose `set` exchanges the masks, for loops that draw new ones every step.

    Raises:
        ValueError: an unknown axis and for masks of the wrong shape or dtype.

    Example:
        with gated(model, axes, {"layers.0.heads": mask}):
            loss = model(**batch).loss
            loss.backward()
    """
    sites = GateSites(axes)
    sites.set(masks)
    unwrap = getattr(
        model, "get_base_model", None
    )  # of a PeftModel; its linears then are adapter layers, which take the same hooks
    base: nn.Module = unwrap() if unwrap is not None else model
    places = {(gate.module, gate.side): gate for axis in axes for gate in axis.gates}
    handles: list[torch.utils.hooks.RemovableHandle] = []
    patched: list[tuple[nn.Module, Any]] = []
    try:
        for name in {norm: None for axis in axes for norm in axis.layer_norms}:
            handles.append(base.get_submodule(name).register_forward_hook(sites.over_kept(name)))
        for place, gate in places.items():
            module = base.get_submodule(place[0])
            if place[1] == "input":
                handles.append(module.register_forward_pre_hook(sites.scale_input(place)))
            elif place[1] == "skip":
                handles.append(module.register_forward_hook(sites.skip(place), with_kwargs=True))
            elif place[1] == "route":
                handles.append(module.register_forward_hook(sites.route(place)))
            elif place[1] == "weights":
                patched.append((module, vars(module).get("forward")))
                module.forward = sites.weighted(module, gate)
            else:
                handles.append(module.register_forward_hook(sites.scale_output(place)))
        yield sites
    finally:
        for handle in handles:
            handle.remove()
        for module, before in patched:
            del module.forward
            if before is not None:  # of a context around this one
                module.forward = before


def _some_left_out(axis: Axis, masks: Mapping[str, Tensor]) -> Tensor | None:
    """Which units of an axis stay [size] or [batch, 1, size], bool; None if all do, or if it has no mask."""
    mask = masks.get(axis.name) if axis.layer_norms else None
    if mask is None or bool((kept := mask.detach() != 0).all()):
        return None
    return kept.unsqueeze(1) if kept.dim() == 2 else kept


def _normed(norm: nn.LayerNorm, x: Tensor, kept: Tensor) -> Tensor:
    """A LayerNorm's output for x [..., width] with mean and variance over what is kept, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    share = kept.to(x) / kept.sum(-1, keepdim=True)
    centred = x - (x * share).sum(-1, keepdim=True)
    normed = centred * torch.rsqrt((centred.square() * share).sum(-1, keepdim=True) + norm.eps)
    return normed * norm.weight + norm.bias


def _times_channels(activation: Tensor, mask: Tensor) -> Tensor:
    """Feature maps [batch, channels, height, width] times a mask [channels] or [batch, 1, channels]."""
    return activation * mask.to(activation).reshape(*mask.shape[:-2], mask.shape[-1], 1, 1)
