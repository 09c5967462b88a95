"""Which rows and columns of a linear layer a text does not use (Mini-GPTs, arXiv 2312.12682): absolute thresholds on
mean activations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Uses:
    """What a linear layer y = W x + b showed on a text, means over its tokens.

    Args:
        inputs: mean |x_j| [in].
        outputs: mean |y_i| [out].
        unbiased: mean |y_i - b_i| [out]; None without a bias.
        activated: mean |a_i| [out] of the activation function that reads y; None where none does.
    """

    inputs: Tensor
    outputs: Tensor
    unbiased: Tensor | None = None
    activated: Tensor | None = None


@dataclass(frozen=True)
class Used:
    """The used part of a linear layer, bool: rows [out], columns [in] and bias entries [out]."""

    rows: Tensor
    columns: Tensor
    bias: Tensor

    def weight(self) -> Tensor:
        """The used entries of W [out, in], bool."""
        return self.rows.unsqueeze(1) & self.columns.unsqueeze(0)


def used(uses: Uses, linear: float | None, activation: float | None) -> Used:
    """What lies above the thresholds; None turns a rule off, and 0 takes what is exactly 0.

    A row leaves if its output, or its output without the bias, is at or below `linear`; its bias only if the whole
    output is. A row and its bias leave if the activation function's output is at or below `activation`. A column leaves
    if its input is at or below `linear`.
    """
    rows, columns = torch.ones_like(uses.outputs, dtype=torch.bool), torch.ones_like(uses.inputs, dtype=torch.bool)
    bias = rows.clone()
    if linear is not None:
        smallest = uses.outputs if uses.unbiased is None else torch.minimum(uses.outputs, uses.unbiased)
        rows, columns, bias = smallest > linear, uses.inputs > linear, uses.outputs > linear
    if activation is not None and uses.activated is not None:
        alive = uses.activated > activation
        rows, bias = rows & alive, bias & alive
    return Used(rows, columns, bias)
