"""Naming the layer at which a model overflows, instead of what came to grief behind it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.errors import ArchError, NumericError
from compresso.observe.sites import Positions, first_output


def finite(tensor: Tensor) -> bool:
    """Whether a tensor with at least one entry holds neither NaN nor Inf, in one pass over it."""
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def check_states(layer: int, states: Tensor) -> None:
    """Raise NumericError naming the layer whose output [batch, seq, hidden] is not finite."""
    if states.numel() and not finite(states.detach()):
        raise NumericError(
            f"layer {layer} outputs NaN or Inf: the model overflows on this data; use float32 or bfloat16"
        )


def watched(model: PreTrainedModel, positions: Positions) -> list[RemovableHandle]:
    """Hooks that raise NumericError at the first layer whose output of a real token is not finite.

    A model whose architecture nobody described has no layers by name, and is not watched.
    """
    try:
        blocks = arch_for(model.config).blocks(model)
    except ArchError:
        return []

    def hook(layer: int) -> Any:
        def left(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            states = first_output(output)
            padded = positions.real is not None and positions.real.shape == states.shape[:2]
            check_states(layer, positions.tokens(states) if padded else states)

        return left

    return [block.register_forward_hook(hook(layer)) for layer, block in enumerate(blocks)]
