"""Weights stored in a better order of inputs, and inputs gathered to meet them (E-Sparse, arXiv 2310.15929, section
3.4).

A linear that computes W x computes W[:, order] x[order] instead: the same sums in another order. A checkpoint keeps W
as any engine reads it, and the order in its records; here both move, so that weights lie in n:m groups, as kernels for
such weights want them. A state dict has the columns where they were: what is saved is what was opened.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresso.errors import ArchError

_HOOKS = "_compresso_gather_inputs"


class _Gathered:
    """Inputs in an order, gathered once for the linears that share them."""

    def __init__(self, order: Tensor, readers: int) -> None:
        self.order, self.readers = order, readers
        self.seen: Any = (
            None  # a weak reference to the last inputs, their version, the same gathered, and who has yet to read them
        )

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a linear reads in the place of its inputs [..., in]."""
        inputs: Tensor = arguments[0]
        version = inputs._version if not inputs.is_inference() else 0
        if self.seen is None or self.seen[0]() is not inputs or self.seen[1] != version or module in self.seen[3]:
            order = self.order = self.order.to(inputs.device)
            self.seen = (ref(inputs), version, inputs.index_select(inputs.dim() - 1, order), set())
        gathered = self.seen[2]
        self.seen[3].add(module)
        if len(self.seen[3]) == self.readers:
            self.seen = None
        return (gathered, *arguments[1:])


def gather_inputs_(model: PreTrainedModel, orders: Sequence[Mapping[str, Any]]) -> None:
    """Reorder the columns of linears and gather their inputs, in place; once.

    Args:
        orders: of each group of linears that read the same: {"linears": full names, "order": places of their inputs
            [in]}.

    Raises:
        ArchError: with nothing changed, if a linear is not there or has other inputs than the order.
    """
    modules = dict(model.named_modules())
    restore_inputs_(model)
    for group in orders:
        for name in group["linears"]:
            if name not in modules:
                raise ArchError(f"the inputs of {name} cannot be gathered: the model has no such module")
            if sorted(group["order"]) != list(range(_inputs(modules[name]))):
                raise ArchError(
                    f"the inputs of {name} cannot be gathered: its order does not name each of its inputs once"
                )
    for group in orders:
        order = torch.tensor(group["order"])
        gathered = _Gathered(order, len(group["linears"]))
        for name in group["linears"]:
            module = modules[name]
            _reorder_(module, order)
            vars(module)[_HOOKS] = (
                order,
                module.register_forward_pre_hook(gathered),
                module.register_state_dict_post_hook(_put_back(order.argsort(), _across(module))),
            )


def restore_inputs_(model: PreTrainedModel) -> None:
    """Undo `gather_inputs_`."""
    for module in model.modules():
        if (found := vars(module).pop(_HOOKS, None)) is not None:
            order, *hooks = found
            for hook in hooks:
                hook.remove()
            _reorder_(module, order.argsort())


def _across(module: nn.Module) -> int:
    """Which dimension of a linear's weight has its inputs."""
    return 0 if isinstance(module, Conv1D) else 1


def _inputs(module: nn.Module) -> int:
    """How many inputs a linear has."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[_across(module)]


@torch.no_grad()
def _reorder_(module: nn.Module, order: Tensor) -> None:
    """Put column order[i] in the place of column i."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight.copy_(weight.index_select(_across(module), order.to(weight.device)))


def _put_back(back: Tensor, across: int) -> Any:
    """A hook that gives a state dict the weight in its own order, as a tensor of its own."""

    def hook(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        weight = state[f"{prefix}weight"]
        state[f"{prefix}weight"] = weight.index_select(across, back.to(weight.device))

    return hook
