"""Gates that drop a token from a layer's context for good, and what they leave of it (Dynamic Context Pruning, arXiv
2305.15805, section 3).

Shapes: query n and key k of one layer [..., queries, keys]. A token passes one gate at each query behind it; what is
left of it is the product of those gates, so products run along queries. They are taken as sums of logarithms, and an
exact zero is carried beside them: log(0 + 1e-40), as in the public code, is -inf in half precision.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compresso.core.schedule import Schedule

STEP = math.inf
"""The alpha of gates that are a step at 0: of evaluation and of caches."""
_LEAST = -69.0
"""Logarithm of the smallest gate that is not 0, 1e-30."""
_LOGISTIC = 1e-6
_HALVINGS, _NEWTON, _GRID, _STEEP = 24, 3, 1025, 7.5


def sigma(z: Tensor, alpha: float) -> Tensor:
    """The first coordinate of alpha-entmax([z, 0]), in [0, 1] and differentiable: logistic at alpha 1, clip((1 + z)/2)
    at 2, a step at infinity. Exactly 0 and 1 from |z| = 1/(alpha - 1) on.

    Args:
        z: of any shape, float32 or float64.
        alpha: at least 1.

    Raises:
        ValueError: alpha below 1.

    >>> sigma(torch.tensor([-1.0, 0.0, 0.5, 2.0]), 2.0)
    tensor([0.0000, 0.5000, 0.7500, 1.0000])
    """
    if not alpha >= 1:
        raise ValueError(f"alpha={alpha} of a gate; wanted 1 or more")
    kind: Any = _Sigma
    gate: Tensor = kind.apply(z, alpha)
    return gate


def keep_log_mask(z: Tensor, visible: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """What is left of each key at each query, as a logarithm to add to attention scores, and how much that is.

    Gates act where a query sees a key other than its own. What it does not see, and what an exact zero dropped at it or
    before, has the lowest number of the dtype, with no gradient: there alpha-entmax has none, either.

    Args:
        z: raw scores [..., queries, keys], float32 or float64; query i's own key is key i.
        visible: which keys a query sees [..., queries, keys], bool: none behind it, no padding, and at a query that is
            padding nothing.
        alpha: of the gates.

    Returns:
        Log mask [..., queries, keys] and the sum over seen pairs other than (n, n) of what is left [].
    """
    kind: Any = _Kept
    log_mask, left = kind.apply(z, visible, alpha)
    return log_mask, left


def least_scores(z: Tensor, visible: Tensor) -> Tensor:
    """The least score that each key had at a query so far [..., queries, keys]: under steps a key is there as long as
    this is above 0. Where no gate acted yet, infinity.

    Args as of `keep_log_mask`.
    """
    return z.masked_fill(~others(visible), torch.inf).cummin(-2).values


def least_log_mask(z: Tensor, visible: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """As `keep_log_mask`, with a token's least score under one logistic gate in place of a product of gates.

    Under steps both are the same. In between, a product of hundreds of gates is next to nothing unless each is all but
    open, and gates that are exactly open or shut have no gradient; a least score has neither fault.

    sharpness: which scores are multiplied by; gates are steps at infinity.
    """
    least = z.masked_fill(~others(visible), 1e4).cummin(-2).values
    gated = others(visible)
    log_mask = torch.nn.functional.logsigmoid(sharpness * least).masked_fill(~visible, torch.finfo(z.dtype).min)
    return log_mask, (log_mask.exp() * gated).sum()


def others(visible: Tensor) -> Tensor:
    """Pairs of a query and a key it sees that is not its own [..., queries, keys]."""
    own = torch.eye(visible.shape[-2], visible.shape[-1], dtype=torch.bool, device=visible.device)
    return visible & ~own


def kept_by_steps(z: Tensor, gated: Tensor) -> Tensor:
    """Which keys are still there at each query under step gates [..., queries, keys], bool.

    gated: where a gate acts; elsewhere it is open.
    """
    dropped = gated & ~(z > 0)
    return dropped.cumsum(-2, dtype=torch.int32) == 0


def alpha_schedule(start: float, end: float, over: int, even: bool = False) -> Schedule:
    """Alpha at an update: half a cosine from `start` to `end` over so many updates, then `end`.

    Args:
        start, end: at least 1; above it if `even`.
        over: updates.
        even: the same half cosine of log(alpha - 1), so that the scores between which a gate is neither open nor shut,
            1/(alpha - 1) either way, narrow by equal factors instead of nearly all at once.

    >>> [round(alpha_schedule(1, 8, 4)(update), 2) for update in (0, 2, 4, 9)]
    [1.0, 4.5, 8.0, 8.0]
    >>> [round(alpha_schedule(1.25, 5, 4, even=True)(update), 2) for update in (0, 2, 4, 9)]
    [1.25, 2.0, 5.0, 5.0]
    """

    def alpha(update: int) -> float:
        left = 0.5 * (1 + math.cos(math.pi * (min(1.0, update / over) if over else 1.0)))
        if even:
            return 1 + (start - 1) ** left * (end - 1) ** (1 - left)
        return end + (start - end) * left

    return alpha


def raised(gamma: float, live: float, target: float, rate: float) -> float:
    """The weight of the sparsity term after a step of dual ascent: higher while more is live than wanted, never
    negative.

    >>> round(raised(0.3, live=0.9, target=0.2, rate=0.1), 2), raised(0.01, live=0.0, target=0.5, rate=0.1)
    (0.37, 0.0)
    """
    return max(0.0, gamma + rate * (live - target))


def _lesser(z: Tensor, beta: float) -> Tensor:
    """log of the lesser coordinate p <= 1/2, where |z| < 1/beta: z = (p^beta - (1-p)^beta)/beta, solved by Newton's
    steps from between two points of a grid. beta = alpha - 1 > 0.
    """
    target = -z.abs()
    if beta > _STEEP:
        return _halved(target, beta)
    near = torch.log1p(beta * target)  # p^beta is near 1 - beta |z| where p is small, so that t bends little over this
    least = math.log(torch.finfo(z.dtype).eps) - 1
    grid = torch.linspace(least, 0.0, _GRID, dtype=z.dtype, device=z.device)
    solved = _halved(torch.expm1(grid) / beta, beta)
    at = (near.clamp(min=least) - least) * ((_GRID - 1) / -least)
    place = at.long().clamp(max=_GRID - 2)
    t = solved[place] + (at - place) * (solved[place + 1] - solved[place])
    return _newton(t, target, beta, t.new_tensor(_LEAST), t.new_tensor(-math.log(2.0)))


def _halved(target: Tensor, beta: float) -> Tensor:
    """The same of targets -|z| by halving first, which is slow, and safe where all but the ends is flat."""
    low, high = torch.full_like(target, _LEAST), torch.full_like(target, -math.log(2.0))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = _difference(middle, beta) > target
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    return _newton((low + high) / 2, target, beta, low, high)


def _newton(t: Tensor, target: Tensor, beta: float, low: Tensor, high: Tensor) -> Tensor:
    """Newton's steps for log p from t, between bounds."""
    for _ in range(_NEWTON):
        p = t.exp()
        rest = torch.log1p(-p)
        power, other = beta * t, beta * rest
        slope = power.exp() + p * (other - rest).exp()
        miss = (torch.expm1(power) - torch.expm1(other)) / beta - target
        t = torch.maximum(torch.minimum(t - miss / slope, high), low)
    return t


def _difference(t: Tensor, beta: float) -> Tensor:
    """(p^beta - (1-p)^beta)/beta of p = exp(t), also for a small beta."""
    return (torch.expm1(beta * t) - torch.expm1(beta * torch.log1p(-t.exp()))) / beta


def _solved(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """log gate and d gate/dz at scores [n] strictly between the thresholds."""
    beta = alpha - 1
    if beta < _LOGISTIC:
        log_gate = torch.nn.functional.logsigmoid(z)
        return log_gate, log_gate.exp() * torch.sigmoid(-z)
    t = _lesser(z, beta)
    rest = torch.log1p(-t.exp())
    slope = 1 / (((beta - 1) * t).exp() + ((beta - 1) * rest).exp())
    return torch.where(z < 0, t, rest), slope


def _inside(z: Tensor, alpha: float) -> Tensor:
    """Scores whose gate is neither 0 nor 1."""
    beta = alpha - 1
    return torch.ones_like(z, dtype=torch.bool) if beta < _LOGISTIC else z.abs() < 1 / beta


class _Sigma(Function):
    """`sigma` with its own backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        gate = (z > 0).to(z.dtype)
        slope = torch.zeros_like(z)
        if math.isfinite(alpha):
            inside = _inside(z, alpha)
            log_gate, slope[inside] = _solved(z[inside], alpha)
            gate[inside] = log_gate.exp()
        ctx.save_for_backward(slope)
        return gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None


class _Kept(Function):
    """`keep_log_mask`: forward keeps the slope of each log gate and the mask, two tensors a layer."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, visible: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        gated = others(visible)
        closed = gated & (z <= 0)
        log_gate, slope = torch.zeros_like(z), torch.zeros_like(z)
        if math.isfinite(alpha):
            inside = gated & _inside(z, alpha)
            closed = closed & ~inside
            solved, steep = _solved(z[inside], alpha)
            log_gate[inside] = solved
            slope[inside] = steep * (-solved).exp()
        log_mask = log_gate.cumsum(-2)
        there = visible & (closed.cumsum(-2, dtype=torch.int32) == 0)
        log_mask = torch.where(there, log_mask, torch.finfo(z.dtype).min)
        counted = gated & there
        left = (log_mask.exp() * counted).sum()
        ctx.save_for_backward(slope, log_mask, there, counted)
        return log_mask, left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, log_mask, there, counted = ctx.saved_tensors
        of_mask, of_left = gradients
        total = torch.where(there, of_mask, 0.0) + of_left * log_mask.exp() * counted
        behind = total.flip(-2).cumsum(-2).flip(-2)  # a gate acts at its query and at all behind it
        return behind * slope, None, None
