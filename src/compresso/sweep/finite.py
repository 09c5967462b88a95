"""Checks that no NaN or Inf gets into a sweep, or out of it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compresso.errors import NumericError
from compresso.sweep.targets import Group, Groups, weight_of


def finite(tensor: Tensor) -> bool:
    """Whether a tensor with at least one entry holds neither NaN nor Inf, in one pass over it."""
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def check_states(layer: int, states: Tensor) -> None:
    """Raise NumericError naming the layer whose output [batch, seq, hidden] is not finite."""
    if not finite(states):
        raise NumericError(
            f"layer {layer} outputs NaN or Inf: the model overflows on this data; use float32 or bfloat16"
        )


def check_weights(model: nn.Module, groups: Groups) -> None:
    """Raise NumericError naming the first weight that is not finite."""
    for here in groups.values():
        _check(model, here, "holds NaN or Inf; repair the model, or add it to ignore")


def check_edited(model: nn.Module, groups: Sequence[Group]) -> None:
    """Raise NumericError naming the first weight that an edit made not finite."""
    _check(model, groups, "was made NaN or Inf; give more calibration examples, or raise damping")


def _check(model: nn.Module, groups: Sequence[Group], words: str) -> None:
    for group in groups:
        for name in group.names:
            if not finite(weight_of(model, name)):
                raise NumericError(f"{name}.weight {words}")
