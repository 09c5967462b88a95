"""Optimal brain surgeon on one linear layer, column by column: the sweep that SparseGPT, GPTQ and their joint form
share.

W is [out, in] and H [in, in] the second moment of the layer's inputs. With H^-1 = U^T U, U upper triangular, a column
that has just been frozen at another value spreads its error over the columns to its right along a row of U; this is
exact while the columns to its left are frozen (SparseGPT, arXiv 2301.00774, section 3.2 and algorithm 1; GPTQ, arXiv
2210.17323, algorithm 1). One factorisation serves all rows, and all matrices that read the same inputs.

What is pruned and how a column is rounded are functions handed in, so that this file knows neither method. Both are
asked when all columns to the left are done, and so look at the compensated weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

Choose = Callable[[Tensor, int], Tensor]
"""Scores [out, width] of the columns from an index on -> which entries go, bool [out, width]."""
Quantize = Callable[[Tensor, int], Tensor]
"""Compensated weights [out, width] that begin at the index of a column -> the rounded column [out]; pruned entries are
0 and are kept at 0.
"""

_STEP = 32
"""Columns from which on one product is faster than as many updates of rank one."""


class NotPositiveDefiniteError(ArithmeticError):
    """A second moment that no damping within reach makes invertible, or that is not finite."""


@dataclass(frozen=True)
class Factor:
    """The inverse of a damped second moment, ready for `column_sweep`.

    Args:
        upper: U [in, in] with H^-1 = U^T U, upper triangular.
        dead: inputs that were always 0 [in], bool; their weights do nothing.
        damping: share of the mean diagonal that was added.
    """

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(moment: Tensor, damping: float = 0.01) -> Factor:
    """Factor the inverse of H + damping * mean(diag H) * I.

    Where that fails the damping grows tenfold, up to three times, then the same is tried in float64; the damping used
    is in the result.

    Args:
        moment: H [in, in], symmetric, float32 or float64.
        damping: share of the mean diagonal; 0.01 in both papers' code.

    Raises:
        NotPositiveDefiniteError: H is not finite, or nothing helped. The caller knows the layer's name.
    """
    if not bool(moment.isfinite().all()):
        raise NotPositiveDefiniteError("the second moment of its inputs holds NaN or Inf")
    dead = moment.diagonal() == 0
    for dtype in dict.fromkeys((moment.dtype, torch.float64)):
        undamped = moment.to(dtype, copy=True)
        undamped.diagonal()[dead] = 1
        mean = undamped.diagonal().mean()
        for share in (damping, *(damping * 10**times for times in (1, 2, 3))):
            damped = undamped.clone()
            damped.diagonal().add_(share * mean)
            upper = _upper_of_inverse(damped)
            if upper is not None:
                return Factor(upper.to(moment.dtype), dead, share)
    raise NotPositiveDefiniteError(
        f"the second moment of its inputs is not positive definite, even with damping {damping * 1000:g} in float64"
    )


def _upper_of_inverse(matrix: Tensor) -> Tensor | None:
    """U with matrix^-1 = U^T U, or None."""
    lower = _cholesky(matrix)
    upper = None if lower is None else _cholesky(torch.cholesky_inverse(lower))
    return None if upper is None or not bool(upper.isfinite().all()) else upper.T.contiguous()


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor, or None."""
    lower, failed = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(matrix))  # pyright: ignore[reportUnknownMemberType]
    return None if int(failed) or not bool((lower.diagonal() > 0).all()) else lower


@dataclass(frozen=True)
class Swept:
    """A layer after the sweep.

    Args:
        weight: [out, in], in the dtype of the factor.
        pruned: what was chosen to go [out, in], bool; rounding may have made more zeros.
        loss: tr(D H D^T) / 2 of each row's change D [out], H damped: the increase that the method minimises.
    """

    weight: Tensor
    pruned: Tensor
    loss: Tensor


def column_sweep(
    weight: Tensor,
    factor: Factor,
    *,
    choose: Choose | None = None,
    every: int = 128,
    quantize: Quantize | None = None,
    block: int = 128,
) -> Swept:
    """Prune and round a layer's columns from left to right, each error compensated by the remaining columns.

    Args:
        weight: W [out, in]; rows of several layers that share the factor may be stacked. Weights of dead inputs become
            0.
        factor: of the layer's inputs.
        choose: called for every `every` columns with w^2 / U_jj^2; None prunes nothing.
        every: columns whose entries are chosen together: `block` for unstructured pruning, m for n:m.
        quantize: None rounds nothing.
        block: columns updated together before the rest is; a matter of speed alone where `every` is not bound to it.
            `every` divides it.

    Raises:
        ValueError: `every` does not divide `block`, or shapes do not fit.
    """
    upper = factor.upper
    rows, columns = weight.shape
    if block % every and choose is not None:
        raise ValueError(f"block={block} is no multiple of the {every} columns that are chosen together")
    if upper.shape != (columns, columns):
        raise ValueError(
            f"the factor is {list(upper.shape)} for a weight of {rows} x {columns}; wanted [{columns}, {columns}]"
        )
    done = weight.to(upper.dtype, copy=True)
    done[:, factor.dead] = 0
    pruned = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    loss = torch.zeros(rows, dtype=upper.dtype, device=weight.device)
    diagonal = upper.diagonal()
    step = (
        _columns_at_once(block, every) if quantize is None else block
    )  # `quantize` wants to see all columns of the block as they are
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        now = done[:, begin:end].T.contiguous()  # [width, out]: a column lies in one piece
        errors, mask = torch.zeros_like(now), torch.zeros_like(now, dtype=torch.bool)
        removed = torch.zeros_like(now)  # 1 / U_jj where an entry goes: a weight times it is the error of zeroing it
        for j in range(begin, end):
            at = j - begin
            if choose is not None and j % every == 0:
                stop = min(at + every, end - begin)
                # the loss of zeroing an entry, w^2 / [H^-1]_jj of the remaining problem, which is w^2 / U_jj^2
                scores = (now[at:stop] / diagonal[j : begin + stop, None]).square().T
                mask[at:stop] = choose(scores, j).T
                torch.div(mask[at:stop], diagonal[j : begin + stop, None], out=removed[at:stop])
            if quantize is None:
                torch.mul(now[at], removed[at], out=errors[at])
            else:
                # E_j = (w_j - q_j) / U_jj (algorithm 1 of both papers)
                value = quantize(now[at:].T, j).masked_fill(mask[at], 0)
                torch.div(now[at] - value, diagonal[j], out=errors[at])
                now[at] = value
            # W_:,k -= E_j U_jk for every k > j: at once for columns that are near, later for the others
            near = min((at // step + 1) * step, end - begin)
            now[at + 1 : near].addr_(upper[j, j + 1 : begin + near], errors[at], alpha=-1)
            if (
                at + 1 == near < end - begin
            ):  # what is further right in the block gets the errors of these columns together
                first = at // step * step
                now[near:].addmm_(
                    upper[begin + first : begin + near, begin + near : end].T, errors[first:near], alpha=-1
                )
        now.masked_fill_(mask, 0)
        pruned[:, begin:end] = mask.T
        done[:, begin:end] = now.T
        # each frozen column raises the layer's squared error by (w - q)^2 / (2 U_jj^2)
        loss += errors.square().sum(dim=0) / 2
        done[:, end:] -= errors.T @ upper[begin:end, end:]
    return Swept(done, pruned, loss)


def _columns_at_once(block: int, every: int) -> int:
    """Columns whose errors go to the rest of a block together: about 32, and whole groups of those that are chosen
    together.
    """
    if every <= _STEP:
        return _STEP // every * every
    return _STEP if every % _STEP == 0 else block
