"""Least squares on one linear layer that lost inputs, or stands before something that left: W is fitted to what the
dense model has at this place.

Tokens x~ [in] are inputs of the already edited model, y* [out] what the layer is to output for them. The fit is

    sum_t w_t |y*_t - W x~_t|^2 + ridge * mean(diag H) * |W - W_old|^2,    H = sum_t w_t x~_t x~_t^T
    W = (T + ridge * mean(diag H) * W_old) (H + ridge * mean(diag H))^-1,  T = sum_t w_t y*_t x~_t^T

Four choices keep it from doing harm. A token counts by one over the squared norm of the stream that it is led to
(which is what the norm in front of the next sub-layer divides it by): the few tokens that draw all attention (massive
activations; Sun et al., arXiv 2402.17762) are a thousand times larger than others and would decide everything. No token
is left out: without them the fit is free to break them, and with them every later layer. And since they are one of
hundreds, too small a share of the sum to be kept, they count a fifth of what all others do: the first token of each
text, and whatever is ten times larger than the median. The ridge pulls to the old weight, never to zero.

Two targets can be mixed, by a share alpha: what the dense layer outputs for the edited model's stream (alpha = 0, the
target of ZipLM, arXiv 2302.04089, and of most layer-wise pruning), and what brings the edited stream back onto the
dense one (alpha = 1). T is linear in the target, so one pass serves every alpha and every ridge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from compresso.core.obs import NotPositiveDefiniteError

TOKENS_PER_COLUMN = 8
"""Calibration tokens that each fitted input should have; with fewer the fit learns their noise."""
SINKS = 0.2
"""What tokens that draw attention count together at least, in shares of what all others do."""
_MASSIVE = 100.0
"""Squared norm of such a token, in medians."""
_SMALLEST = 1e-4
"""Of the median squared target norm: targets smaller than this count as much as one of this size."""


def token_weights(targets: Tensor, row: int = 0) -> Tensor:
    """One over each target's squared norm [tokens], float32, and more for tokens that draw attention; see `sinks`.

    Targets near zero would count without bound, so that norms are taken for at least a hundredth of the median norm.

    Args:
        targets: [tokens, out], whole: what a layer adds to, and what it adds.
        row: tokens of each text, one text behind the other; 0 where the targets do not begin with a first token.
    """
    squared = targets.float().square().sum(dim=1)
    least = (squared.median() * _SMALLEST).clamp(min=torch.finfo(torch.float32).tiny)
    return sinks(squared, row) / squared.clamp(min=least)


def sinks(squared: Tensor, row: int) -> Tensor:
    """How often tokens count [tokens]: 1, and more for those that draw attention where they are few, so that these
    count `SINKS` of what all others do. These are the first of each text, and those of massive norm.

    Args:
        squared: norms of the stream [tokens].
        row: as `token_weights` takes it.
    """
    drawing = squared > squared.median() * _MASSIVE
    if row:
        drawing |= torch.arange(len(squared), device=squared.device) % row == 0
    n = int(drawing.sum())
    return torch.where(drawing, max(1.0, SINKS * (len(squared) - n) / max(n, 1)), 1.0)


@dataclass(frozen=True)
class Moments:
    """Sums over weighted tokens, float64.

    Args:
        inputs: H [in, in].
        cross: T of each target [targets, out, in].
        energy: sum of w |y*|^2 of each target [targets].
        tokens: how many were added.
    """

    inputs: Tensor
    cross: Tensor
    energy: Tensor
    tokens: int

    def cross_of(self, alpha: float) -> Tensor:
        """T [out, in] of the mixture of the first (1 - alpha) and the last target (alpha)."""
        return self.cross[0] * (1 - alpha) + self.cross[-1] * alpha if len(self.cross) > 1 else self.cross[0]


def gathered(before: Moments | None, inputs: Tensor, targets: Sequence[Tensor], weights: Tensor) -> Moments:
    """The moments with some more tokens in them.

    Products are taken in float32, which both factors fit in once they are weighted, and added up in float64.

    Args:
        before: of the tokens so far; None at the beginning.
        inputs: x~ [tokens, in].
        targets: y* [tokens, out] each.
        weights: w [tokens].
    """
    root = weights.float().sqrt().unsqueeze(1)
    x, of_targets = inputs.float() * root, [target.float() * root for target in targets]
    new = Moments(
        (x.T @ x).double(),
        torch.stack([(y.T @ x).double() for y in of_targets]),
        torch.stack([y.double().square().sum() for y in of_targets]),
        len(inputs),
    )
    if before is None:
        return new
    return Moments(
        before.inputs + new.inputs,
        before.cross + new.cross,
        before.energy + new.energy,
        before.tokens + new.tokens,
    )


def refitted(weight: Tensor, inputs: Tensor, cross: Tensor, ridge: float = 0.3) -> Tensor:
    """The weight [out, in], float64, that minimises the objective in this file's header.

    Args:
        weight: W_old [out, in].
        inputs: H [in, in], float64.
        cross: T [out, in], float64.
        ridge: share of the mean diagonal of H, above 0.

    Raises:
        NotPositiveDefiniteError: H or T is not finite, H is zero, or rounding outweighs the ridge. The caller knows the
            layer's name.
    """
    if not ridge > 0:
        raise ValueError(f"ridge={ridge}: wanted a number above 0, such as 0.3")
    old, pull = weight.double(), ridge * inputs.diagonal().mean()
    damped = inputs.clone()
    damped.diagonal().add_(pull)
    lower, failed = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(damped))  # pyright: ignore[reportUnknownMemberType]
    if int(failed) or not bool(damped.isfinite().all()):
        raise NotPositiveDefiniteError(
            "the second moment of its inputs is zero, holds NaN or Inf, or needs a larger ridge"
        )
    # the step from the old weight is solved for: where there is nothing to mend it is 0 exactly
    step = torch.cholesky_solve((cross - old @ inputs).T, lower).T
    fitted = old + step
    if not bool(fitted.isfinite().all()):
        raise NotPositiveDefiniteError("the fitted weight holds NaN or Inf")
    return fitted


def error(weight: Tensor, moments: Moments) -> float:
    """Sum of w |y* - W x~|^2 over that of w |y*|^2, of the last target: 0 is perfect, 1 what a weight of zeros has.

    Args:
        weight: W [out, in].
        moments: of tokens that the fit need not have seen.
    """
    given, cross, energy = weight.double(), moments.cross[-1], moments.energy[-1]
    squared = energy - 2 * (given * cross).sum() + ((given @ moments.inputs) * given).sum()
    return float(squared.clamp(min=0) / energy.clamp(min=torch.finfo(torch.float64).tiny))


def tokens_wanted(columns: int) -> int:
    """Calibration tokens that a fit of so many inputs should have."""
    return TOKENS_PER_COLUMN * columns
