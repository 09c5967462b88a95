"""What stands in for a removed sub-layer, so that the stock decoder layer still runs: it adds zero to the residual
stream.

None of these modules has parameters, and that is how a removed sub-layer is recognised. The norm before it becomes
`nn.Identity`. BLOOM's sub-layers are given the stream and return their sum with it; two of these stand in for them.
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


class NoMixMlp(nn.Module):
    """An FFN without channels, in a family whose FFN is told the height and width of feature maps."""

    def forward(self, hidden_states: Tensor, *_: object) -> Tensor:
        """Zeros of the input's shape without their memory."""
        return hidden_states.new_zeros(()).expand_as(hidden_states)


class NoExperts(nn.Module):
    """A mixture without experts, in a family whose FFN also gives the router's scores: zeros, and no scores."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Zeros of the input's shape without their memory."""
        return hidden_states.new_zeros(()).expand_as(hidden_states), None


class NoAttentionSum(nn.Module):
    """An attention without heads, in a family whose attention adds the stream itself: the stream as it came."""

    def forward(self, hidden_states: Tensor, residual: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """The stream, and no attention weights."""
        return residual, None


class NoMlpSum(nn.Module):
    """An FFN without channels, in a family whose FFN adds the stream itself: the stream as it came."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """The stream."""
        return residual


def is_absent(module: nn.Module) -> bool:
    """Whether a sub-layer has been removed."""
    return next(module.parameters(), None) is None
