"""Rounding inside training: weights and activations on few levels in the forward pass, gradients as if they were not.

    textbook            symmetric   steps of max|x| / (2^(b-1) - 1), codes -(2^(b-1) - 1) to 2^(b-1) - 1: both ends are
                                    levels
                        asymmetric  the range, widened to hold 0, in 2^b - 1 steps with a whole zero point
    deepspeed_compat    symmetric   steps of 2 max|x| / 2^b, codes -2^(b-1) to 2^(b-1) - 1: +max is clipped to 7/8 of
                                    itself at 4 bits
                        asymmetric  steps of range / 2^b from the multiple of a step nearest to the least: the greatest
                                    is never reached

The second are the quantisers of DeepSpeed's compression library, with which "Understanding INT4 Quantization for
Language Models" (Wu et al., arXiv 2301.12017) was made; with 16 levels they leave one unused at an end. Two bits are
ternary there (0, +-alpha; alpha the mean |x| of what lies beyond .7 of the mean) and one bit binary (the mean |x| with
the sign of x).

All gradients pass unchanged (Bengio et al., arXiv 1308.3432), also where a value was clipped, as in DeepSpeed's code.
Departures from it: a row without a range (zeros, or one value, as pruned rows are) would give 0 / 0 and becomes what it
was; means of binary and ternary rows leave zeros out, which are weights that pruning took.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor

LEAST, MOST, FULL = 1, 8, 16
"""Bits of the coarsest and of the finest rounding, and those that stand for none."""
_BEYOND = 0.7
"""Of the mean magnitude: what lies below it is 0 in a ternary row."""


class Style(StrEnum):
    """Whose definition of a grid."""

    TEXTBOOK = "textbook"
    DEEPSPEED = "deepspeed_compat"


@dataclass(frozen=True)
class Quantiser:
    """A rounding to few levels, straight through for gradients.

    Args:
        bits: 1 to 8, or 16 for none; 1 is binary and 2 ternary.
        symmetric: levels around 0, or from the least to the greatest value.
        style: as in this file's header.

    Raises:
        ValueError: other bits, or a binary or ternary rounding that is not symmetric.

    >>> Quantiser(4, style=Style.DEEPSPEED)(torch.tensor([8.0, -8.0, 4.0, 1.0]))
    tensor([ 7., -8.,  4.,  1.])
    """

    bits: int
    symmetric: bool = True
    style: Style = Style.TEXTBOOK

    def __post_init__(self) -> None:
        """Refuse what has no grid."""
        if not (LEAST <= self.bits <= MOST or self.bits == FULL):
            raise ValueError(f"bits={self.bits}: wanted {LEAST} to {MOST}, or {FULL} for no rounding")
        if self.bits <= 2 and not self.symmetric:
            raise ValueError(f"bits={self.bits} is binary or ternary, which lies around 0; give symmetric=True")

    def __call__(self, values: Tensor) -> Tensor:
        """Values [..., n], float, whose last dimension shares a scale; of the same shape and type."""
        if self.bits == FULL:
            return values
        with torch.no_grad():
            if self.bits == 1:
                rounded = binary(values)
            elif self.bits == 2:
                rounded = ternary(values)
            else:
                rounded = self._on_grid(values, values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True))
        return straight_through(values, rounded)

    def within(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Values of any shape on the grid of a range that is known before: low, high [] or of a shape that broadcasts.

        Raises:
            ValueError: a binary or ternary rounding, whose levels are means.
        """
        if self.bits == FULL:
            return values
        if self.bits <= 2:
            raise ValueError(f"bits={self.bits} has levels that are means, and no range; give 3 to {MOST} bits")
        with torch.no_grad():
            rounded = self._on_grid(values, low, high)
        return straight_through(values, rounded)

    def _on_grid(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if self.symmetric:
            return symmetric(values, torch.maximum(high.abs(), low.abs()), self.bits, self.style)
        return asymmetric(values, low, high, self.bits, self.style)


def symmetric(values: Tensor, top: Tensor, bits: int, style: Style = Style.TEXTBOOK) -> Tensor:
    """Values on the grid around 0 whose largest magnitude is `top` [..., 1]; see this file's header."""
    half = 2 ** (bits - 1)
    textbook = style is Style.TEXTBOOK
    scale = _or_one(top / (half - 1) if textbook else 2 * top / 2**bits)
    return (values / scale).round().clamp(1 - half if textbook else -half, half - 1) * scale


def asymmetric(values: Tensor, low: Tensor, high: Tensor, bits: int, style: Style = Style.TEXTBOOK) -> Tensor:
    """Values on the grid from `low` to `high`, each [..., 1]; see this file's header."""
    levels = 2**bits
    if style is Style.TEXTBOOK:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _or_one((high - low) / (levels - 1))
        zero = (-low / scale).round()
        return (((values / scale).round() + zero).clamp(0, levels - 1) - zero) * scale
    scale = _or_one((high - low) / levels)
    start = torch.where(high > low, (low / scale).round() * scale, low)
    return ((values - start) / scale).round().clamp(0, levels - 1) * scale + start


def binary(values: Tensor) -> Tensor:
    """The mean magnitude of what is not 0 in a row, with the sign of each value; 0 stays 0."""
    there = values != 0
    mean = values.abs().sum(dim=-1, keepdim=True) / there.sum(dim=-1, keepdim=True).clamp(min=1)
    return values.sign() * mean


def ternary(values: Tensor) -> Tensor:
    """0 below .7 of a row's mean magnitude, and the mean magnitude of the others with their sign."""
    size, there = values.abs(), values != 0
    mean = size.sum(dim=-1, keepdim=True) / there.sum(dim=-1, keepdim=True).clamp(min=1)
    beyond = there & (size > _BEYOND * mean)
    alpha = (size * beyond).sum(dim=-1, keepdim=True) / beyond.sum(dim=-1, keepdim=True).clamp(min=1)
    return values.sign() * beyond * alpha


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, to the bit, with the gradient of `values`."""
    if not values.requires_grad:
        return rounded
    return cast(Tensor, cast(Any, _StraightThrough).apply(values, rounded))


class _StraightThrough(torch.autograd.Function):
    """The second of two tensors, whose gradient goes to the first."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *outgoing: Tensor) -> tuple[Tensor, None]:
        return outgoing[0], None


def _or_one(scale: Tensor) -> Tensor:
    """A scale, and 1 where there is no range."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
