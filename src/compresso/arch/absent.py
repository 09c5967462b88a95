"""What stands in for a removed sub-layer, so that the stock decoder layer still runs: it adds zero to the residual
stream.

Neither module has parameters, and that is how a removed sub-layer is recognised. The norm before it becomes
`nn.Identity`.
"""

from torch import Tensor, nn


class NoAttention(nn.Module):
    """An attention without heads: it reads nothing, writes zeros and owns no slot of the key/value cache."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Zeros of the input's shape without their memory, and no attention weights."""
        return hidden_states.new_zeros(()).expand_as(hidden_states), None


class NoMlp(nn.Module):
    """An FFN without channels: it reads nothing and writes zeros."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zeros of the input's shape without their memory."""
        return hidden_states.new_zeros(()).expand_as(hidden_states)


def is_absent(module: nn.Module) -> bool:
    """Whether a sub-layer has been removed."""
    return next(module.parameters(), None) is None
