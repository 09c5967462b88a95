"""Scales that move between a linear layer and what feeds it: W diag(s) applied to x / s is W x, but rounds better (AWQ,
SmoothQuant).

W is [out, in], s [in]. Which s is best is measured by what rounding changes in the layer's outputs on average over
calibration tokens, tr(D M D^T) with D the change of the weights and M = E[x x^T] their inputs' second moment: the mean
squared error, without the tokens.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from compresso.core.rounding import fit

Round = Callable[[Tensor], Tensor]
"""Weights [out, in] -> the nearest points of their grid."""

_LEAST = 1e-4
"""Below it a scale, or a typical weight, is not distinguished from 0."""


def output_error(change: Tensor, moment: Tensor) -> float:
    """Mean squared error of a layer's outputs, summed over outputs. change: of its weights [out, in]; moment: E[x x^T]
    [in, in].
    """
    return float((change @ moment * change).sum())


def typical_weight(weight: Tensor, group: int) -> Tensor:
    """Mean over outputs of |W| / the largest |W| of its row and group [in] (AutoAWQ's `w_mean`). group 0 is
    the whole row.
    """
    grouped = weight.abs().reshape(len(weight), -1, group or weight.shape[1])
    return (grouped / grouped.amax(dim=2, keepdim=True).clamp(min=1e-12)).reshape(weight.shape).mean(dim=0)


def activation_scales(
    size: Tensor, weight: Tensor, group: int, steps: int, by_weight: bool
) -> Iterator[tuple[float, Tensor]]:
    """AWQ's candidates (arXiv 2306.00978, eq. 5): s = a^r for r = 0, 1/steps, ..., as (r, s [in]); the geometric middle
    of s's range is 1.

    Args:
        size: a, the mean |x| of each input [in].
        weight: [out, in], of all layers that read these inputs.
        group: inputs that share a rounding scale; 0 for all of a row.
        steps: number of candidates.
        by_weight: s = a^r / w^(1 - r) with w as in `typical_weight`, as AutoAWQ has it.
    """
    size = size.clamp(min=_LEAST)
    typical = typical_weight(weight, group) + _LEAST if by_weight else None
    for step in range(steps):
        r = step / steps
        scale = size**r if typical is None else size**r / typical ** (1 - r)
        scale = scale.clamp(min=_LEAST)
        yield r, scale / (scale.max() * scale.min()).sqrt()


def smoothing_scale(top: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s = max|x|^alpha / max|w|^(1 - alpha) of each input [in] (SmoothQuant, arXiv 2211.10438, eq. 4); 1 where either
    is 0.

    Args:
        top: the largest |x| of each input [in].
        weight: [out, in], of all layers that read these inputs.
        alpha: share of the difficulty that moves from activations to weights, in [0, 1].
    """
    largest = weight.abs().amax(dim=0)
    scale = top**alpha / largest.clamp(min=1e-12) ** (1 - alpha)
    return torch.where((top > 0) & (largest > 0), scale.clamp(1e-5, 1e5), 1.0)


def round_clipped(
    weight: Tensor, moment: Tensor, bits: int, *, group: int, symmetric: bool, steps: int = 20, least: float = 0.5
) -> Tensor:
    """Rounded weights [out, in], each row and group first clamped where that lowers its outputs' error (AWQ's code,
    `auto_clip`).

    Args:
        weight: [out, in], float32.
        moment: E[x x^T] [in, in].
        bits, group, symmetric: of the grid; see `compresso.core.rounding.fit`.
        steps: candidates, each 1 / steps of the largest |w| apart, from no clamping down.
        least: share of the largest |w| that no candidate is at or below.
    """
    width = group or weight.shape[1]
    own = torch.stack(
        [moment[at : at + width, at : at + width] for at in range(0, len(moment), width)]
    )  # [groups, width, width]
    grouped = weight.reshape(len(weight), -1, width)
    top = grouped.abs().amax(dim=2, keepdim=True)
    best, lowest = grouped, torch.full(grouped.shape[:2], torch.inf, dtype=weight.dtype, device=weight.device)
    for step in range(int((1 - least) * steps)):
        limit = top * (1 - step / steps)
        clamped = grouped.clamp(-limit, limit).reshape(weight.shape)
        tried = fit(clamped, bits, group=group, symmetric=symmetric).round(clamped).reshape(grouped.shape)
        # d E[x x^T] d^T, the mean squared change of a row's output by one group's change d
        change = (tried - grouped).transpose(0, 1)  # [groups, out, width]
        error = (torch.bmm(change, own) * change).sum(dim=2).T
        better = error < lowest
        best, lowest = torch.where(better.unsqueeze(2), tried, best), torch.where(better, error, lowest)
    return best.reshape(weight.shape)


def best_scale(
    weight: Tensor, moment: Tensor, candidates: Iterator[tuple[float, Tensor]], rounded: Round
) -> tuple[float | None, Tensor, float, float]:
    """The candidate whose rounded weights change the outputs least; not to scale is a candidate, too.

    Args:
        weight: [out, in], float32.
        moment: E[x x^T] [in, in].
        candidates: (exponent, scale [in]).
        rounded: rounds W diag(s).

    Returns:
        The exponent (None: 1 is best), the scale, its error, and the error without scaling.
    """
    return best_common_scale([(weight, moment)], candidates, rounded)


def best_common_scale(
    pieces: Sequence[tuple[Tensor, Tensor]], candidates: Iterator[tuple[float, Tensor]], rounded: Round
) -> tuple[float | None, Tensor, float, float]:
    """As `best_scale`, one scale for several weights, each with the second moment of its own inputs: of experts, sums
    over the tokens of each, so that one counts by how many it is given.
    """
    scale = torch.ones_like(pieces[0][1][0])
    plain = least = sum(output_error(rounded(weight) - weight, moment) for weight, moment in pieces)
    exponent: float | None = None
    for r, tried in candidates:
        error = sum(output_error(rounded(weight * tried) / tried - weight, moment) for weight, moment in pieces)
        if error < least:
            exponent, scale, least = r, tried, error
    return exponent, scale, least, plain
