"""What a unit is worth by the gradients of its LoRA adapters alone (LoRAPrune, arXiv 2305.18403, section 3.2).

With W + s B A in the forward, one step of gradient descent at rate 1 on the factors changes B A by -(dB A + B dA - dB
dA). LoRAPrune takes that change as the gradient of the weight:

    G = dB A + B dA - dB dA,    I = |G * (W + s B A)|   entry by entry

Entries are summed over a unit's rows (or columns) of each matrix, divided by the L2 norm of that matrix' sums, and
added over the matrices. Never more than one matrix of the weight's shape exists at a time. Departure: a unit is a
key/value head with its query heads, or a channel, whatever the number of heads; the public code cuts every matrix into
32 blocks of 128 rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.core.axis import Axis

EPSILON = 1e-8
"""Added to a matrix' norm."""


@dataclass(frozen=True)
class Factors:
    """One adapter with its gradients: b [out, rank], a [rank, in], db and da like them, and the scale s of B A."""

    b: Tensor
    a: Tensor
    db: Tensor
    da: Tensor
    scale: float


def estimated_gradient(factors: Factors) -> Tensor:
    """G = dB A + B dA - dB dA, float32 [out, in]: minus the change of B A in one step of gradient descent at rate 1.

    >>> one = torch.ones(1, 1)
    >>> estimated_gradient(Factors(2 * one, 3 * one, 0.5 * one, 0.25 * one, 1.0)).item()
    1.875
    """
    b, a, db, da = (tensor.float() for tensor in (factors.b, factors.a, factors.db, factors.da))
    return db @ a + (b - db) @ da


def unit_importance(axis: Axis, weight: Callable[[str], Tensor], adapters: Mapping[str, Factors]) -> Tensor:
    """LoRAPrune's score of each unit of an axis [size], float64 on the CPU; matrices without an adapter count for
    nothing.

    Args:
        axis: of heads or channels.
        weight: parameter name -> base weight [out, in].
        adapters: by parameter name.

    Raises:
        ValueError: no matrix of the axis has an adapter.
    """
    total = torch.zeros(axis.size, dtype=torch.float64)
    pieces = [piece for piece in axis.slices if piece.param in adapters]
    if not pieces:
        raise ValueError(
            f"no matrix of {axis.name} has an adapter, so LoRA gradients say nothing of its units; add its linears to"
            " targets"
        )
    for name in dict.fromkeys(piece.param for piece in pieces):
        factors = adapters[name]
        importance = estimated_gradient(factors)
        adapted = (factors.b.float() @ factors.a.float()).mul_(factors.scale).add_(weight(name).float())
        importance.mul_(adapted).abs_()
        for piece in pieces:  # a fused projection holds several of a unit's
            if piece.param == name:
                sums = piece.entries(importance, axis.size).sum(dim=1).double().cpu()
                total += sums / (float(sums.square().sum().sqrt()) + EPSILON)
    return total


def moved_average(old: Sequence[Tensor], new: Sequence[Tensor], momentum: float) -> list[Tensor]:
    """S <- momentum S + (1 - momentum) S_new, axis by axis; the old ones if a new one is not finite."""
    if not all(bool(torch.isfinite(one).all()) for one in new):
        return list(old)
    return [momentum * one + (1 - momentum) * other for one, other in zip(old, new, strict=True)]


def cubic_progress(step: int, steps: int, warmup: float = 0.1, done: float = 0.9) -> float:
    """The share of the way to the target after `step` of `steps` updates: 0 up to `warmup` of them, 1 from `done`,
    cubic between.

    >>> [round(cubic_progress(k, 100), 3) for k in (10, 50, 90)]
    [0.0, 0.875, 1.0]
    """
    at = (step / steps - warmup) / (done - warmup)
    return 1 - (1 - min(max(at, 0.0), 1.0)) ** 3
