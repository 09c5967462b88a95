"""How far a part of a network rotates the residual stream, and which contiguous run of layers rotates it least.

Block influence is ShortGPT's (arXiv 2403.03853, section 3.2, eq. 1), the angular distance is that of Gromov et al.
(arXiv 2403.17887, section 3.2, eq. 7). Unusual: neither takes the difference 1 - cos or the arccos of a cosine near 1,
where half of the digits are lost; both start from the chord between the two unit vectors. So a part that changes
nothing, or only the length, scores 0 in float32 too.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos(before, after) of each token [...], in [0, 2]; NaN where a state is zero and has no direction.

    before, after: [..., hidden], any float dtype; computed in float32 or wider. arXiv 2403.03853, eq. 1, without the
    mean.
    """
    return (unit(before) - unit(after)).square().sum(dim=-1) / 2


def angle(before: Tensor, after: Tensor) -> Tensor:
    """arccos(cos(before, after)) / pi of each token [...], in [0, 1]; NaN where a state is zero and has no direction.

    before, after: [..., hidden], any float dtype; computed in float32 or wider. arXiv 2403.17887, eq. 7, without the
    mean.
    """
    one, other = unit(before), unit(after)
    return 2 * torch.atan2(_length(one - other), _length(one + other)).squeeze(-1) / math.pi


def unit(states: Tensor) -> Tensor:
    """States of length 1 [..., hidden], in float32 or wider; NaN where a state is zero."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    # dividing by the largest entry first keeps squares of large states finite
    wide = wide / wide.abs().amax(dim=-1, keepdim=True)
    return wide / _length(wide)


def _length(states: Tensor) -> Tensor:
    """Euclidean length [..., 1]."""
    return states.square().sum(dim=-1, keepdim=True).sqrt()


def least_distant_run(distances: Tensor, fits: Callable[[range], bool]) -> range | None:
    """The layers of the shortest contiguous run whose removal fits; of several, the least distant, then the first.

    Args:
        distances: [layers + 1, layers + 1]; entry [i, j] is the distance between the streams before layer i and before
            layer j, where "before layer `layers`" is behind the last one. Entries below the diagonal are not read.
        fits: whether the model without these layers is small enough.

    Returns None if no run fits that leaves a layer. arXiv 2403.17887, section 3.2: l* = argmin over l of d(l, l + n).
    """
    layers = len(distances) - 1
    for length in range(layers):
        runs = [run for run in (range(start, start + length) for start in range(layers - length + 1)) if fits(run)]
        if runs:
            return min(runs, key=lambda run: float(distances[run.start, run.stop]))
    return None
