"""Checks that no NaN or Inf gets into a sweep, or out of it."""

from collections.abc import Sequence

from torch import nn

from compresso.errors import NumericError
from compresso.observe.overflow import finite
from compresso.sweep.targets import Group, Groups, weight_of


def check_weights(model: nn.Module, groups: Groups) -> None:
    """Raise NumericError naming the first weight that is not finite."""
    for here in groups.values():
        _check(model, here, "holds NaN or Inf; repair the model, or add it to where.ignore")


def check_edited(model: nn.Module, groups: Sequence[Group]) -> None:
    """Raise NumericError naming the first weight that an edit made not finite."""
    _check(model, groups, "was made NaN or Inf; give more calibration examples, or raise damping")


def _check(model: nn.Module, groups: Sequence[Group], words: str) -> None:
    for group in groups:
        for name in group.names:
            if not finite(weight_of(model, name)):
                raise NumericError(f"{name}.weight {words}")
