"""Uniform grids for weights and rounding to the nearest point: 2 to 8 bits, per output channel or per group of inputs.

Asymmetric: the range of a row or group, widened to hold 0, is cut into 2^b - 1 steps; the zero point is a whole step: 0
remains 0. Symmetric: [-m, m] in 2^b - 1 steps with the zero point in the middle (as GPTQ's code); one code is never
used and 0 remains 0. `fit_signed` is the grid of products of 8-bit integers instead (SmoothQuant, arXiv 2211.10438,
section 2): [-m, m] in steps of m / (2^(b-1) - 1), so that m is a point of it; the code of -2^(b-1) is never used. A row
of zeros gets the scale 1 (SparseGPT's code takes the range [-1, 1] instead; both round 0 to
0).

`clip` shrinks the range in steps of 1 % down to 20 % and keeps the smallest sum of |error|^2.4, as the search in the
public code of SparseGPT (unused there) and GPTQ (its `mse` option) does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKS = 80
NORM = 2.4


@dataclass(frozen=True)
class Grid:
    """Points scale * (code - zero), codes 0 to 2^bits - 1.

    Args:
        scale, zero: [rows, groups].
        bits: of a code.
        group: inputs that share a scale; 0 for all.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    group: int = 0

    def codes(self, weight: Tensor, first: int = 0) -> Tensor:
        """Nearest codes of columns `first` and on [rows, width], float; half to even."""
        scale, zero = self._of(weight, first)
        return (torch.round(weight / scale) + zero).clamp(0, 2**self.bits - 1)

    def round(self, weight: Tensor, first: int = 0) -> Tensor:
        """Nearest points of columns `first` and on [rows, width]."""
        scale, zero = self._of(weight, first)
        return scale * (self.codes(weight, first) - zero)

    def _of(self, weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each entry, broadcast over columns."""
        if not self.group:
            return self.scale, self.zero
        which = torch.arange(first, first + weight.shape[1], device=weight.device) // self.group
        return self.scale[:, which], self.zero[:, which]


def fit(weight: Tensor, bits: int, *, group: int = 0, symmetric: bool = False, clip: bool = False) -> Grid:
    """The grid of a matrix.

    Args:
        weight: [rows, columns], float32 or float64.
        bits: 2 to 8.
        group: consecutive columns with a scale of their own; 0 for one scale a row.
        symmetric, clip: see the header.

    Raises:
        ValueError: `bits` is out of range or `group` does not divide the columns.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: wanted 2 to 8")
    if group and weight.shape[1] % group:
        raise ValueError(f"group={group} does not divide {weight.shape[1]} inputs")
    grouped = weight.reshape(weight.shape[0], -1, group or weight.shape[1])
    low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = _grid(low, high, bits, group, symmetric)
    if not clip:
        return best
    # ranges shrunk in steps of a hundredth; the least sum of |error|^2.4 wins (GPTQ's code, `mse`)
    error = _error(weight, best)
    scale, zero = best.scale.clone(), best.zero.clone()
    for step in range(1, SHRINKS):
        grid = _grid(low * (1 - step / 100), high * (1 - step / 100), bits, group, symmetric)
        found = _error(weight, grid)
        better = found < error
        scale, zero, error = (
            torch.where(better, new, old) for new, old in ((grid.scale, scale), (grid.zero, zero), (found, error))
        )
    return Grid(scale, zero, bits, group)


def fit_signed(weight: Tensor, bits: int) -> Grid:
    """The grid of signed integers of each row: steps of the largest |weight| over 2^(bits-1) - 1, 127 for 8 bits.

    Args:
        weight: [rows, columns], float32 or float64.
        bits: 2 to 8.

    Raises:
        ValueError: `bits` is out of range.

    >>> fit_signed(torch.tensor([[-1.27, 0.014]]), 8).round(torch.tensor([[-1.27, 0.014]]))
    tensor([[-1.2700,  0.0100]])
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: wanted 2 to 8")
    top = weight.abs().amax(dim=1, keepdim=True)
    scale = torch.where(top > 0, top / (2 ** (bits - 1) - 1), 1)
    return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)


def _grid(low: Tensor, high: Tensor, bits: int, group: int, symmetric: bool) -> Grid:
    """The grid over given ranges [rows, groups]."""
    steps = 2**bits - 1
    scale = (high - low) / steps
    scale = torch.where(scale > 0, scale, 1)
    zero = torch.full_like(scale, (steps + 1) / 2) if symmetric else torch.round(-low / scale)
    return Grid(scale, zero, bits, group)


def _error(weight: Tensor, grid: Grid) -> Tensor:
    """Sum of |rounding error|^2.4 of each row and group [rows, groups]."""
    apart = (grid.round(weight) - weight).abs().pow(NORM)
    return apart.reshape(*grid.scale.shape, -1).sum(dim=2)


def bits_per_weight(shapes: Sequence[tuple[int, ...]], bits: int, group: int, symmetric: bool) -> float:
    """What packed codes take, with a 16-bit scale and, if asymmetric, a zero point of `bits` for each row or group;
    shapes [out, in].

    >>> bits_per_weight([(64, 256)], 4, 128, symmetric=False)
    4.15625
    """
    weights = sum(out * inputs for out, inputs in shapes)
    grids = sum(out * (inputs // group if group else 1) for out, inputs in shapes)
    return bits + grids * (16 + (0 if symmetric else bits)) / weights


def recovered(weight: Tensor, bits: int, group: int = 0, *, symmetric: bool = True) -> Grid | None:
    """A grid that holds all of a matrix' values already, or None: what `fit` rounded to, or a coarser one.

    Args:
        weight: [rows, columns], of any float type; its rounding is allowed for.
        bits, group: as in `fit`; with more than about 6 bits a bfloat16 matrix is too coarse to show it.
        symmetric: whether the zero point is in the middle of the codes; otherwise it lies where all values fit.
    """
    if group and weight.shape[1] % group:
        return None
    exact = weight.float().reshape(weight.shape[0], -1, group or weight.shape[1])
    top, half, steps = exact.abs().amax(dim=2), 2 ** (bits - 1), 2**bits - 1
    scale, unknown = torch.ones_like(top), top > 0
    zero = torch.full_like(top, half if symmetric else 0)
    for largest in range(1, half + 1 if symmetric else steps + 1):  # the step of the largest value, counted from 0
        if not bool(unknown.any()):
            break
        tried = torch.where(top > 0, top / largest, 1).unsqueeze(2)
        moved = torch.round(exact / tried)
        low, high = moved.amin(dim=2).clamp(max=0), moved.amax(dim=2).clamp(min=0)
        inside = (low >= -half) & (high < half) if symmetric else high - low <= steps
        close = (moved * tried - exact).abs() <= torch.finfo(weight.dtype).eps * exact.abs() * 2
        fits = close.all(dim=2) & inside & unknown
        scale = torch.where(fits, tried.squeeze(2), scale)
        zero = zero if symmetric else torch.where(fits, -low, zero)
        unknown = unknown & ~fits
    return None if bool(unknown.any()) else Grid(scale, zero, bits, group)
