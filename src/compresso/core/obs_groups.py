"""Optimal brain surgeon by groups of input columns: which leave a matrix, one after another, and what is left to do.

W is [out, in] and H [in, in] the damped second moment of its inputs, so that a change D of W costs tr(D H D^T). With
P = H^-1 of the columns that are still there, group S

    costs    tr(W_S (P_SS)^-1 W_S^T)                        if all the others are fitted anew,
    moves    W -= W_S (P_SS)^-1 P_S:                        to exactly that fit, and
    leaves   P -= P_:S (P_SS)^-1 P_S:                       as the inverse of what stays of H

(ZipLM, arXiv 2302.04089, section 3.1; derived from LeCun's and Hassibi's optimal brain surgeon). Every removal is
followed by new scores: of two columns that say the same, each alone is free to go, and the other one is needed then.

Unusual: the costs are tr((P_SS)^-1 A_SS) with A = W^T W, and A follows by A -= E^T F + F^T E, where E = L^-1 P_S:,
P_SS = L L^T, F = L^-1 A_S: - K E / 2 and K = L^-1 A_SS L^-T. So W itself is not needed for an order, a metric on the
outputs would be one more factor in A, and updates can wait until there are many: rows of P and A are read through
those that are pending. Weights come from `refit`, which depends on nothing but what stays. All in float64: P runs over
as many downdates as there are columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from compresso.core.obs import NotPositiveDefiniteError

_PENDING = 64
"""Updates of rank one that are applied together, as one product."""


@dataclass(frozen=True)
class Quadratic:
    """What a change D of a layer's weights costs: tr(D H D^T).

    Args:
        moment: H [in, in], damped, float64.
        inverse: H^-1 [in, in], float64.
        dead: inputs that were always 0 [in], bool; they leave at no cost.
        damping: share of the mean diagonal of live inputs that was added.
    """

    moment: Tensor
    inverse: Tensor
    dead: Tensor
    damping: float


def damped(moment: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """H + damping * mean(diag H) * I, the mean being that of inputs which are not dead, and which are dead [in], bool.

    A dead input gets that mean on the diagonal, so that the rest does not depend on it.

    Args:
        moment: H [in, in], symmetric, of any scale and floating dtype.
        damping: share of the mean diagonal; 0.01 in the paper's code.

    Returns:
        [in, in] and [in], float64 and bool.
    """
    wide = moment.to(torch.float64, copy=True)
    diagonal = wide.diagonal()
    dead = diagonal == 0
    mean = diagonal.new_ones(()) if bool(dead.all()) else diagonal[~dead].mean()
    diagonal[dead] = mean
    diagonal += damping * mean
    return wide, dead


def quadratic(moment: Tensor, damping: float = 0.01) -> Quadratic:
    """The quadratic of a second moment, `damped`; the damping grows tenfold, up to three times, where it is not enough.

    Raises:
        NotPositiveDefiniteError: the moment is not finite, or no damping within reach helped.
    """
    if not bool(moment.isfinite().all()):
        raise NotPositiveDefiniteError("the second moment of its inputs holds NaN or Inf")
    for share in (damping * 10**times for times in range(4)):
        wide, dead = damped(moment, share)
        lower, failed = _factored(wide)
        if not bool(failed):
            return Quadratic(wide, torch.cholesky_inverse(lower), dead, share)
    raise NotPositiveDefiniteError(
        f"the second moment of its inputs is not positive definite, even with damping {damping * 1000:g} in float64"
    )


class Elimination:
    """A layer while columns leave it. Numbers stay on its device, which is waited for when they are asked for alone.

    Args:
        gram: A [in, in], float64, taken over.
        inverse: P [in, in], float64, taken over.
        lost: before [], float64.
    """

    def __init__(self, gram: Tensor, inverse: Tensor, lost: Tensor | None = None) -> None:
        self._gram, self._inverse = gram, inverse
        self.lost = gram.new_zeros(()) if lost is None else lost
        self._failed = torch.zeros((), dtype=torch.bool, device=gram.device)
        self._left, self._right = gram[:0], gram[:0]

    @staticmethod
    def of(weight: Tensor, cost: Quadratic) -> "Elimination":
        """A whole layer: W [out, in], and the cost of changes to it."""
        wide = weight.to(torch.float64).masked_fill(cost.dead, 0)
        return Elimination(wide.T @ wide, cost.inverse.clone())

    def fork(self) -> "Elimination":
        """The same state, to go on in two ways."""
        self._settle()
        return Elimination(self._gram.clone(), self._inverse.clone(), self.lost)

    @property
    def error(self) -> float:
        """What has been lost so far, tr(D H D^T) of the best fit."""
        return float(self.lost)

    @property
    def gram(self) -> Tensor:
        """A [in, in]; rows and columns of what left are 0."""
        self._settle()
        return self._gram

    @property
    def inverse(self) -> Tensor:
        """P [in, in]; rows and columns of what left are 0."""
        self._settle()
        return self._inverse

    def blocks(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """P_SS and A_SS of some groups [n, g] of live columns: [n, g, g] each."""
        self._settle()
        rows, columns = groups.unsqueeze(2), groups.unsqueeze(1)
        return self._inverse[rows, columns], self._gram[rows, columns]

    def remove(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Let a group [g] of live columns leave; returns E and F [g, in] of this file's header. Behind one or many
        removals, `check`.
        """
        left, right = self._left[:, columns], self._right[:, columns]
        inverse = self._inverse[columns] - left.T @ self._left
        gram = self._gram[columns] - left.T @ self._right - right.T @ self._left
        factor, failed = _factored(inverse[:, columns])
        self._failed |= failed
        half = _solved(factor, _solved(factor, gram[:, columns]).T)
        half = (half + half.T) / 2
        moved = _solved(factor, inverse)
        other = _solved(factor, gram) - half @ moved / 2
        self._left, self._right = torch.cat([self._left, moved]), torch.cat([self._right, other])
        self._clear(columns)
        self.lost = self.lost + half.trace().clamp(min=0)
        if len(self._left) >= _PENDING:
            self._settle()
        return moved.index_fill_(1, columns, 0), other.index_fill_(1, columns, 0)

    def check(self) -> None:
        """Wait for the device. Raises NotPositiveDefiniteError if rounding has used up the inverse in a removal: the
        damping is too small.
        """
        if bool(self._failed):
            raise _not_definite()

    def _clear(self, columns: Tensor) -> None:
        """Leave nothing of columns that left, exactly, whatever rounding would."""
        for matrix in (self._gram, self._inverse):
            matrix.index_fill_(0, columns, 0).index_fill_(1, columns, 0)
        self._left.index_fill_(1, columns, 0)
        self._right.index_fill_(1, columns, 0)

    def _settle(self) -> None:
        """Apply what is pending."""
        if len(self._left):
            self._inverse.addmm_(self._left.T, self._left, alpha=-1)
            crossed = self._left.T @ self._right
            self._gram.sub_(crossed).sub_(crossed.T)
            self._left, self._right = self._left[:0], self._right[:0]


@dataclass(frozen=True)
class Nested:
    """Groups in the order in which they leave.

    Args:
        order: their indices.
        errors: what is lost before the first, after the first, ... [len(order) + 1], ascending.
    """

    order: tuple[int, ...]
    errors: tuple[float, ...]


def group_scores(inverse: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """tr((P_SS)^-1 A_SS) of each group [n], at least 0, from `Elimination.blocks`, and whether one of P_SS has no
    factor [], bool; without waiting for the device.
    """
    if inverse.shape[1] == 1:
        return (gram / inverse).flatten().clamp(min=0), inverse.new_zeros((), dtype=torch.bool)
    lower, failed = _factored(inverse)
    solved = torch.cholesky_solve(gram, lower)
    return solved.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=0), failed.any()


def nested(layer: Elimination, groups: Tensor, teams: Sequence[int] | None = None) -> Nested:
    """Remove the group that costs least, again and again, until none is left. `layer` is left at that end.

    Args:
        layer: all columns of the groups are alive.
        groups: columns [n, g] of each, disjoint.
        teams: the team of each group [n]; once a group has left, the others of its team stay. None: every group leaves.

    Raises:
        NotPositiveDefiniteError: as `Elimination.remove`.
    """
    inverse, gram = layer.blocks(groups)
    names = list(range(len(groups)) if teams is None else teams)
    of = torch.tensor(names, device=groups.device)
    waiting = torch.ones(len(groups), dtype=torch.bool, device=groups.device)
    order, errors, failed = list[Tensor](), [layer.lost], waiting.new_zeros(())
    unit = torch.eye(groups.shape[1], dtype=inverse.dtype, device=inverse.device)
    for _ in range(len(set(names))):  # without waiting for the device
        scores, wrong = group_scores(inverse, gram)
        failed |= wrong
        one = scores.masked_fill(~waiting, torch.inf).argmin().unsqueeze(0)
        both = layer.remove(groups[one].flatten())
        moved, other = both[0][:, groups].transpose(0, 1), both[1][:, groups].transpose(0, 1)  # [n, g, g]
        inverse -= moved.mT @ moved
        crossed = moved.mT @ other
        gram -= crossed + crossed.mT
        inverse[one] = unit
        gram[one] = 0  # so that it can be factored along with the others
        waiting &= of != of[one]
        order.append(one)
        errors.append(layer.lost)
    layer.check()
    if bool(failed):
        raise _not_definite()
    if not order:
        return Nested((), (layer.error,))
    removed = cast(list[int], torch.cat(order).tolist())  # pyright: ignore[reportUnknownMemberType]
    left = cast(list[float], torch.stack(errors).tolist())  # pyright: ignore[reportUnknownMemberType]
    return Nested(tuple(removed), tuple(left))


def refit(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """The kept columns of W, fitted so that least is lost: W_k + W_g H_gk (H_kk)^-1, g being the others.

    Args:
        weight: W [out, in], of any floating dtype.
        moment: H [in, in], as `damped` gives it.
        kept: indices of columns, ascending [k].

    Returns:
        [out, k], float64.

    Raises:
        NotPositiveDefiniteError: what stays of H has no inverse; the damping is too small, or the moment is not finite.
    """
    wide = weight.to(torch.float64)
    gone = torch.ones(wide.shape[1], dtype=torch.bool, device=wide.device)
    gone[kept] = False
    if not bool(gone.any()) or not len(kept):
        return wide[:, kept]
    missing = wide[:, gone] @ moment[gone][:, kept]
    return wide[:, kept] + torch.cholesky_solve(missing.T, _cholesky(moment[kept][:, kept])).T


def _cholesky(matrix: Tensor) -> Tensor:
    """The lower factor of [..., g, g]. Raises NotPositiveDefiniteError."""
    lower, failed = _factored(matrix)
    if bool(failed.any()):
        raise _not_definite()
    return lower


def _not_definite() -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError("what stays of the second moment of its inputs is not positive definite")


def _factored(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of [..., g, g], and which of them have none."""
    if matrix.shape[-1] == 1:  # of single columns, thousands of times: calls of the solver would cost most
        return matrix.sqrt(), ~((matrix > 0) & matrix.isfinite()).all(dim=-1).all(dim=-1)
    lower, failed = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(matrix))  # pyright: ignore[reportUnknownMemberType]
    return lower, (failed != 0) | ~lower.isfinite().all(dim=-1).all(dim=-1)


def _solved(lower: Tensor, right: Tensor) -> Tensor:
    """lower^-1 right."""
    if lower.shape[-1] == 1:
        return right / lower
    return cast(Tensor, torch.linalg.solve_triangular(lower, right, upper=False))  # pyright: ignore[reportUnknownMemberType]
