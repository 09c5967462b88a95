"""Linear regression of a model's score on which of its units were on: few observations, many columns, no training loop.

Ridge in its dual form costs one eigendecomposition of [rows, rows], whatever the number of columns, and gives for every
strength the errors of rows that were omitted without fitting again. With an intercept that is not penalised, x and y
less their means:

    theta = X^T (X X^T + lambda I)^-1 y                                     (1)
    M = lambda (X X^T + lambda I)^-1 - 1 1^T / n                            (2)  M y are the residuals
    left-out residuals of the rows G = (M_GG)^-1 (M y)_G                    (3)  exactly those of a fit without G

Unusual: rows may be omitted `together`. A mask and its complement are one observation as far as single units go: with
one of them in the fit, the other is predicted from it alone, which says nothing about unseen masks. All of it runs in
float64 on the CPU, so that devices agree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in range(4, -5, -1))
"""Ridge strengths that are tried, strongest first, relative to the mean eigenvalue of X X^T."""


@dataclass(frozen=True)
class Linear:
    """A fitted linear model.

    Args:
        coefficients: [columns], float64.
        intercept: what it predicts where all columns are 0.
        chosen: what was tuned, and the error it was tuned by; for records.
    """

    coefficients: Tensor
    intercept: float
    chosen: Mapping[str, float] = field(default_factory=dict[str, float])

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [rows], float64, for x [rows, columns]."""
        return observed(x) @ self.coefficients + self.intercept


Fit = Callable[[Tensor, Tensor], Linear]
"""A regression: from x [rows, columns] and y [rows]."""


def ridge(x: Tensor, y: Tensor, *, strengths: Sequence[float] = STRENGTHS, together: int = 1) -> Linear:
    """Ridge with the strength whose left-out rows are predicted best; of equal ones, the first.

    Args:
        x: [rows, columns], of any dtype.
        y: [rows], of any floating dtype.
        strengths: relative to the mean eigenvalue of X X^T, so that they suit any scale; above 0, strongest first.
        together: so many consecutive rows are omitted at once (2 for masks that are each followed by their
            complement).

    Returns:
        The model; `chosen` holds `strength` (lambda itself) and `left_out_error` (mean square over the left-out rows).

    Raises:
        ValueError: rows are too few or cannot be omitted in such groups, a value is not finite, or a strength is not
            above 0.
    """
    x, y = observed(x), observed(y)
    n = check_rows(x, y, together)
    if not strengths or min(strengths) <= 0:
        raise ValueError(f"strengths={list(strengths)}; wanted at least one, all of them above 0")
    x_mean, y_mean = x.mean(dim=0), y.mean()
    centred = x - x_mean
    values, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(centred @ centred.T))  # pyright: ignore
    values = values.clamp(min=0)
    scale = float(values.mean()) or 1.0
    along = vectors.T @ (y - y_mean)
    best = (float("inf"), strengths[0] * scale)
    for strength in (relative * scale for relative in strengths):
        maker = vectors * (strength / (values + strength)) @ vectors.T - 1 / n  # eq. 2
        error = float(_left_out(maker, maker @ y, together).square().mean())
        best = min(best, (error, strength), key=lambda pair: pair[0])
    error, strength = best
    theta = centred.T @ (vectors @ (along / (values + strength)))  # eq. 1
    return Linear(theta, float(y_mean - x_mean @ theta), {"strength": strength, "left_out_error": error})


def _left_out(maker: Tensor, residuals: Tensor, together: int) -> Tensor:
    """Eq. 3: what the residuals [rows] would be in fits without their own group, as [groups, together]."""
    groups = len(residuals) // together
    blocks = maker.reshape(groups, together, groups, together).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return cast(Tensor, torch.linalg.solve(blocks, residuals.reshape(groups, together)))  # pyright: ignore


def kendall_tau(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b between two [n]: 1 for the same order, -1 for the reverse, 0 if either has no order (all values
    are equal).

    >>> round(kendall_tau(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])), 4)
    0.6667
    """
    signs_a, signs_b = (torch.sign(values.unsqueeze(1) - values) for values in (observed(a), observed(b)))
    pairs = (signs_a.abs().sum() * signs_b.abs().sum()).sqrt()
    return float((signs_a * signs_b).sum() / pairs) if pairs else 0.0


def folds(rows: int, n_folds: int, together: int = 1) -> list[Tensor]:
    """Which rows each fold holds out, bool [rows]; consecutive, `together` of them never parted, sizes as equal as that
    allows.

    Raises:
        ValueError: fewer groups of rows than folds, or fewer than 2 folds.
    """
    groups = rows // together
    if n_folds < 2 or groups < n_folds or rows % together:
        raise ValueError(
            f"{rows} rows, {together} together, do not make {n_folds} folds; give at least 2 folds and as many groups"
            " of rows"
        )
    fold = torch.arange(groups).mul(n_folds).div(groups, rounding_mode="floor").repeat_interleave(together)
    return [fold == i for i in range(n_folds)]


def cross_validated_tau(fit: Fit, x: Tensor, y: Tensor, *, n_folds: int = 5, together: int = 1) -> float:
    """Mean Kendall tau between observed and predicted y of the rows that each fold holds out.

    Raises:
        ValueError: as `fit` and `folds` do.
    """
    taus = [kendall_tau(fit(x[~held], y[~held])(x[held]), y[held]) for held in folds(len(y), n_folds, together)]
    return sum(taus) / len(taus)


def observed(values: Tensor) -> Tensor:
    """Values as regressions compute with them: float64 on the CPU."""
    return values.detach().to("cpu", torch.float64)


def check_rows(x: Tensor, y: Tensor, together: int) -> int:
    """The number of rows.

    Raises:
        ValueError: unless x [rows, columns] and y [rows] are finite and make at least two groups of rows.
    """
    if x.dim() != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)} do not match; wanted [rows, columns] and [rows]")
    if together < 1 or len(y) % together or len(y) < 2 * together:
        raise ValueError(f"{len(y)} rows do not make at least two groups of {together}; draw more masks")
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x or y holds NaN or infinity; wanted finite numbers. Clip scores that overflow")
    return len(y)
