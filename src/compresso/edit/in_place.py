"""Removal under a running optimizer: parameters stay the objects that it holds, and its moments lose the same entries.

`shrink_` puts new parameters in the place of those that it cuts. Here their numbers are moved into the old ones, so
that groups and states by parameter go on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from compresso.core.axis import Axis
from compresso.core.plan import Plan
from compresso.edit.shrink import kept_entries

_POWERS = {"exp_avg": 1, "exp_avg_sq": 2}
"""AdamW's moments, as powers of a gradient."""

States = dict[nn.Parameter, dict[str, Any]]
"""An optimizer's state of each parameter."""


@contextmanager
def same_parameters(model: nn.Module) -> Iterator[None]:
    """Within the context parameters may be replaced by others of the same names; afterwards they are the old ones, with
    the numbers and the shape of the new, and without a gradient where they are cut.
    """
    before = dict(model.named_parameters())
    yield
    old = {new: before[name] for name, new in model.named_parameters() if new is not before[name]}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter in old:
                setattr(module, key, old[parameter])
    for new, parameter in old.items():
        parameter.grad = None
        parameter.data = new.data


@torch.no_grad()
def cut_moments_(states: States, model: nn.Module, axes: Sequence[Axis], plan: Plan) -> None:
    """Cut an optimizer's state as `shrink_` is about to cut the weights; before it does.

    A norm's weight is multiplied by sqrt(size / kept) then, so that its gradients are divided by that; queries by
    sqrt(kept / size) where heads get narrower, as many channels leaving in each.
    """
    by_param: dict[str, list[tuple[int, Tensor]]] = {}
    for (name, dim), entries in kept_entries(model, axes, plan).items():
        by_param.setdefault(name, []).append((dim, entries))
    factors: dict[str, float] = {}
    for axis in axes:
        n = len(plan.kept.get(axis.name, range(axis.size)))
        if 0 < n < axis.size:
            factors |= {f"{norm}.weight": (axis.size / n) ** 0.5 for norm in axis.norms}
            factors |= {piece.param: (n / axis.size) ** 0.5 for piece in axis.rooted}
    for name, parameter in model.named_parameters():
        if name not in by_param and name not in factors:
            continue
        state = states.get(parameter, {})
        for key, value in state.items():
            if key not in _POWERS:
                continue
            cut = cast(Tensor, value)
            for dim, entries in by_param.get(name, ()):
                cut = cut.index_select(dim, entries.to(cut.device))
            state[key] = cut / factors.get(name, 1.0) ** _POWERS[key]


@torch.no_grad()
def zero_units_(tensor: Tensor, axis: Axis, name: str, units: Tensor) -> None:
    """Set the entries of units of an axis to 0, in a tensor of a parameter's shape.

    Args:
        tensor: a parameter, or a moment of it; changed in place.
        axis: whose units tile their tensors.
        name: of the parameter.
        units: int64.
    """
    for piece in axis.slices:
        if piece.param == name:
            view = tensor.detach().narrow(piece.dim, piece.start, axis.size * piece.width)
            view.unflatten(piece.dim, (axis.size, piece.width)).index_fill_(piece.dim, units.to(tensor.device), 0)
