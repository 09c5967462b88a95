"""Matrices of low rank: truncated singular values, plain or whitened by what the matrix meets, and what they save.

A matrix W [rows, columns] of rank r is a product of two, [rows, r] and [r, columns], of r (rows + columns) numbers and
as many multiplications for each input. Whitened: with H = S S^T the second moment of the inputs (a sum over tokens),
the error of the outputs is |(W - W') S|^2, so W' = [W S]_r S^-1 has the least there is, the sum of the squares of the
singular values of W S that were dropped (Wang et al., arXiv 2403.07378, theorem 3.2). Everything is float64.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from compresso.core.obs import NotPositiveDefiniteError

_MOST_DAMPING = 1e-2
"""Of the mean diagonal; a second moment that needs more says nothing of the inputs."""


@dataclass(frozen=True)
class Truncated:
    """A matrix of low rank.

    Args:
        left, right: its factors [rows, rank] and [rank, columns], float64; the singular values are shared out between
            them by their roots.
        dropped: the sum of squares of the singular values that were dropped.
        total: that of all.
    """

    left: Tensor
    right: Tensor
    dropped: float
    total: float

    @property
    def product(self) -> Tensor:
        """The matrix [rows, columns], float64."""
        return self.left @ self.right


@dataclass(frozen=True)
class Root:
    """A root of a damped second moment.

    Args:
        lower: lower triangular [width, width], float64; lower @ lower.T is the damped moment.
        damping: share of the mean diagonal that was added.
    """

    lower: Tensor
    damping: float


def factored_size(rows: int, columns: int, rank: int) -> int:
    """How many numbers two factors have, and how many multiplications they take for an input.

    >>> factored_size(576, 1536, 335), 576 * 1536
    (707520, 884736)
    """
    return rank * (rows + columns)


def most_rank(rows: int, columns: int) -> int:
    """The highest rank whose factors are smaller than the matrix; 0 if there is none.

    >>> most_rank(4096, 4096), most_rank(1024, 4096), most_rank(576, 576), most_rank(1, 9)
    (2047, 819, 287, 0)
    """
    return (rows * columns - 1) // (rows + columns)


def rank_for(rows: int, columns: int, keep: float) -> int:
    """The highest rank whose factors have at most this share of a matrix' numbers; 0 if not even one fits.

    Args:
        rows, columns: of the matrix.
        keep: share, above 0 and below 1.

    >>> rank_for(4096, 4096, 0.8), rank_for(1024, 4096, 0.8), rank_for(576, 576, 0.8), rank_for(192, 576, 0.8)
    (1638, 655, 230, 115)
    """
    rank = (
        int(keep * rows * columns / (rows + columns)) + 1
    )  # one above: a share such as .3 lies below what it stands for
    while rank > 0 and factored_size(rows, columns, rank) > keep * rows * columns * (1 + 1e-12):
        rank -= 1
    return min(rank, most_rank(rows, columns))


def root_of(moment: Tensor, damping: float) -> Root:
    """The Cholesky factor of a second moment of inputs.

    Args:
        moment: sum of x x^T over tokens [width, width], of any floating dtype.
        damping: share of its mean diagonal that is added to it, above 0; tenfold until it can be factored, at most
            1e-2.

    Raises:
        ValueError: the damping is not above 0.
        NotPositiveDefiniteError: it is not finite, or no damping within reach helps.
    """
    if damping <= 0:
        raise ValueError(f"damping={damping:g} never grows; give a share above 0")
    wide = moment.double()
    mean = float(wide.diagonal().mean())
    if not bool(torch.isfinite(wide).all()) or mean <= 0:
        raise NotPositiveDefiniteError(f"its mean square is {mean:g}")
    while damping <= _MOST_DAMPING * (1 + 1e-9):
        damped = wide.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(damped))  # pyright: ignore[reportUnknownMemberType]
        if not int(failed):
            return Root(lower, damping)
        damping *= 10
    raise NotPositiveDefiniteError(f"damped by {_MOST_DAMPING:g} of its mean diagonal it has no Cholesky factor")


def truncated(weight: Tensor, rank: int, lower: Tensor | None = None) -> Truncated:
    """The matrix of a rank that is nearest to another one, on its own or on what it meets.

    Args:
        weight: [rows, columns], of any floating dtype.
        rank: from 1 to the smaller side.
        lower: a root of the inputs' second moment [columns, columns], lower triangular (`root_of`); None measures all
            inputs alike, which is the plain truncation.

    Returns:
        Its factors, with `dropped` the squared error: of the matrix, or of its outputs over all tokens of the moment.

    Raises:
        ValueError: the rank is none of this matrix.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank={rank} is none of a matrix {list(weight.shape)}; give 1 to {min(weight.shape)}")
    wide = weight.double()
    met = wide if lower is None else wide @ lower.double()
    u, values, vh = cast(tuple[Tensor, ...], torch.linalg.svd(met, full_matrices=False))  # pyright: ignore[reportUnknownMemberType]
    roots = values[:rank].sqrt()
    right = roots.unsqueeze(1) * vh[:rank]
    if lower is not None:  # right S^-1
        right = cast(Tensor, torch.linalg.solve_triangular(lower.double(), right, upper=False, left=False))  # pyright: ignore
    squares = values.square()
    return Truncated(u[:, :rank] * roots, right, float(squares[rank:].sum()), float(squares.sum()))


def refitted(weight: Tensor, right: Tensor, lower: Tensor) -> Tensor:
    """The left factor that, with a given right one, is nearest to a matrix on what it meets (arXiv 2403.07378, first
    version, section 3.2).

    Args:
        weight: [rows, columns], of any floating dtype.
        right: [rank, columns], of full rank.
        lower: a root of the inputs' second moment [columns, columns] (`root_of`).

    Returns:
        left [rows, rank], float64, of the least |(weight - left right) lower|: least squares, by QR.
    """
    wide = lower.double()
    met, kept = weight.double() @ wide, right.double() @ wide
    solved = cast(tuple[Tensor, ...], torch.linalg.lstsq(kept.T, met.T))  # pyright: ignore[reportUnknownMemberType]
    return solved[0].T


def rank_within(values: Tensor, rounding: float) -> int:
    """The least rank that a matrix may have had before it was rounded.

    Rounding changes each number by at most a share of itself, so the whole by at most that share of its norm; and no
    matrix of rank r is nearer than the singular values beyond r. A matrix of rank r that was rounded is never given
    a higher one, whatever it holds (but for numbers below the smallest normal one, which change by more).

    Args:
        values: its singular values, descending, float64.
        rounding: the most that a number changes, as a share of it: half of the dtype's epsilon.

    Returns:
        The rank, at least 1.
    """
    squares = values.square()
    beyond = squares.flip(0).cumsum(0).flip(0)  # at r: of all from r on, without cancellation
    allowed = (rounding * (1 + 1e-9)) ** 2 * float(squares.sum())
    return max(1, int((beyond > allowed).sum()))
