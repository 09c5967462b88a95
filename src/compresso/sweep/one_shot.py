"""What a sweep does to the linears of a group: zero entries by a score, or prune and round them with the error
compensated.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compresso.core.obs import NotPositiveDefiniteError, Quantize, column_sweep, inverse_factor
from compresso.core.sparsity import at_most_threshold, lowest_in_groups, lowest_share, wanda_score
from compresso.errors import NumericError
from compresso.observe.folds import Stats
from compresso.sweep.targets import Group, matrix
from compresso.sweep.visitors import Edit

Compat = str
"""'exact', or 'reference' for the off-by-one and the ties of the public code."""


def zeroed(model: nn.Module, gone: Callable[[Group, Tensor], tuple[Tensor, Mapping[str, Any]]]) -> Edit:
    """An edit that zeros entries of each matrix by its Wanda score; the statistic is the sum of squares. Where it is of
    no token at all, as of an expert that none chose, inputs count alike: the score is the weight's magnitude.

    gone: a group and the score [out, in] of one of its matrices -> which entries become zero [out, in], and facts to
    note.
    """

    def edit(group: Group, seen: Stats) -> Mapping[str, Any]:
        notes: dict[str, Any] = {}
        for name in group.names:
            weight = matrix(model, name)
            mask, facts = gone(group, wanda_score(weight, seen.total if seen.n else torch.ones_like(seen.total)))
            weight.masked_fill_(mask, 0)
            notes[name] = dict(facts)
        return notes

    return edit


def compensated(
    model: nn.Module,
    *,
    choose: Callable[[Group, Tensor], Tensor] | None = None,
    every: int = 128,
    quantize: Callable[[Tensor, Tensor], Quantize] | None = None,
    in_order: bool = False,
    damping: float = 0.01,
    block: int = 128,
    otherwise: Edit | None = None,
) -> Edit:
    """An edit that prunes and rounds with optimal brain surgeon updates; the statistic is the second moment.

    Where that is of no token at all, as of an expert that none chose, inputs count alike: the identity in its place
    lets the smallest weights go and rounds the others to the nearest, and nothing makes up for anything.

    Args:
        model: whose linears are edited.
        choose: a group and w^2 / U_jj^2 of `every` columns of one matrix [out, every] -> which entries go; None prunes
            nothing.
        every, damping, block: see `compresso.core.obs`.
        quantize: the weights of a group's matrices, stacked [out, in], before anything is done, and the order [in] in
            which columns are swept -> how the column at a place of that order is rounded; None rounds nothing.
        in_order: sweep the inputs with the largest second moments first.
        otherwise: edits a group whose second moment cannot be inverted; it is given the sum of squares. None stops.

    Raises NumericError, when it edits and nothing else was told, naming the linears whose second moment cannot be
    inverted.
    """

    def edit(group: Group, seen: Stats) -> Mapping[str, Any]:
        moment = seen.total * (2 / seen.n) if seen.n else torch.eye(*seen.total.shape).to(seen.total)
        order = (
            moment.diagonal().argsort(descending=True, stable=True)
            if in_order
            else torch.arange(len(moment), device=moment.device)
        )
        try:
            factor = inverse_factor(moment[order][:, order] if in_order else moment, damping)
        except NotPositiveDefiniteError as error:
            if otherwise is not None:
                told = otherwise(group, Stats(seen.total.diagonal().clamp(min=0), seen.n))
                return {name: {**facts, "loss": None, "not_inverted": str(error)} for name, facts in told.items()}
            raise NumericError(
                f"{', '.join(group.names)}: {error}; give more calibration examples, raise damping, or add it to"
                " where.ignore"
            ) from error
        pieces = [matrix(model, name).float() for name in group.names]
        rows = [len(piece) for piece in pieces]
        stacked = torch.cat(pieces)

        def each(scores: Tensor, _: int) -> Tensor:
            assert choose is not None
            return torch.cat([choose(group, part) for part in scores.split(rows)])

        swept = column_sweep(
            stacked[:, order],
            factor,
            choose=None if choose is None else each,
            every=every,
            quantize=None if quantize is None else quantize(stacked, order),
            block=block,
        )
        back = order.argsort()
        notes: dict[str, Any] = {}
        for name, weight, loss in zip(
            group.names, swept.weight[:, back].split(rows), swept.loss.split(rows), strict=True
        ):
            matrix(model, name).copy_(weight)
            notes[name] = {"loss": float(loss.sum()), "damping": factor.damping}
        return notes

    return edit


def obs_choice(share: float, pattern: tuple[int, int] | None, compat: Compat) -> Callable[[Group, Tensor], Tensor]:
    """How SparseGPT chooses: n of m a row, or the lowest share of all rows and the columns of a block (arXiv
    2301.00774, section 3.2).
    """
    if pattern is not None:
        return lambda _, scores: lowest_in_groups(scores, *pattern)
    if compat == "reference":
        return lambda _, scores: at_most_threshold(scores, share)
    return lambda _, scores: lowest_share(scores, share)


def more_damped(notes: Mapping[str, Any], damping: float) -> dict[str, float]:
    """The linears that needed more damping than asked for, and how much."""
    return {name: facts["damping"] for name, facts in notes.items() if facts.get("damping", damping) > damping}
