"""Rounding whose range is learned: a grid a row, from a share of its least weight to a share of its greatest (as BESA
does it beside its masks, arXiv 2402.16880, section 3.3; the shares are OmniQuant's clipping strengths, 2308.13137).

    step h = (g1 max W - g0 min W) / (2^b - 1)      zero z = -round(g0 min W / h)
    W_q    = (clamp(round(W / h) + z, 0, 2^b - 1) - z) h

Gradients pass rounding unchanged, so the shares g0 and g1 learn from what is clipped and from what rounds. The range
holds 0, and 0 remains 0. A row of zeros keeps a step of 1.
"""

import torch
from torch import Tensor

from compresso.core.quantisers import straight_through
from compresso.core.rounding import Grid

LEAST_SHARE = 0.1
"""Below it a row's range would be nothing; shares are held between it and 1."""


def clipped_rounding(weight: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Rows on grids of learned range [rows, columns].

    Args:
        weight: [rows, columns], float.
        low, high: shares of a row's least and greatest weight [rows, 1].
        bits: of a code.
    """
    grid = learned_grid(weight, low, high, bits)
    codes = (_rounded(weight / grid.scale) + grid.zero).clamp(0, 2**bits - 1)
    return (codes - grid.zero) * grid.scale


def learned_grid(weight: Tensor, low: Tensor, high: Tensor, bits: int) -> Grid:
    """The grids that `clipped_rounding` rounds to; arguments as there."""
    least, greatest = weight.amin(dim=1, keepdim=True).clamp(max=0), weight.amax(dim=1, keepdim=True).clamp(min=0)
    step = (high * greatest - low * least) / (2**bits - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return Grid(step, -_rounded(low * least / step), bits)


def _rounded(values: Tensor) -> Tensor:
    """Whole numbers, half to even, with the gradient of the values."""
    return straight_through(values, values.detach().round())
