"""What a sweep does to linears that get a low rank: truncated, on their own or on what they meet; the product is put in
the weight's place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.low_rank import Root, factored_size, rank_for, refitted, root_of, truncated
from compresso.core.obs import NotPositiveDefiniteError
from compresso.errors import NumericError, RecipeError
from compresso.observe.folds import Stats
from compresso.sweep.block import BlockEdit, BlockVisit, Reference
from compresso.sweep.compressed import Compressed
from compresso.sweep.targets import Group, Groups, matrix, names_of
from compresso.sweep.visitors import Edit


def ranks_of(model: nn.Module, groups: Groups, keep: float) -> dict[str, int]:
    """The rank that each linear gets, by full name, in order. Needs shapes only.

    Raises RecipeError for one of which not even rank 1 has as few numbers.
    """
    found: dict[str, int] = {}
    for name in names_of(groups):
        rows, columns = matrix(model, name).shape
        found[name] = rank_for(rows, columns, keep)
        if not found[name]:
            raise RecipeError(
                f"{name} is {rows} by {columns}: not even rank 1 has keep={keep:g} of its numbers; keep more, or add it"
                " to where.ignore"
            )
    return found


def factored_weights(model: PreTrainedModel, ranks: Mapping[str, int]) -> Compressed:
    """The weights that get these ranks, and how many numbers their factors have."""
    weights = factored = 0
    for name, rank in ranks.items():
        rows, columns = matrix(model, name).shape
        weights += rows * columns
        factored += factored_size(rows, columns, rank)
    return Compressed(weights, factored=factored)


def of_low_rank(model: nn.Module, ranks: Mapping[str, int], whiten: bool, damping: float) -> Edit:
    """An edit that truncates; the statistic is the second moment.

    Args:
        model: whose linears are edited.
        ranks: by full name.
        whiten: keep what counts on the inputs, by their second moment; else what counts of the matrix itself.
        damping: see `compresso.core.low_rank.root_of`.

    Raises NumericError, when it edits, naming the linears whose second moment has no root.
    """

    def edit(group: Group, seen: Stats) -> Mapping[str, Any]:
        moment = seen.total.double()
        return _truncate_(model, group, ranks, _root(group, moment, damping) if whiten else None, moment)

    return edit


def of_dense_low_rank(model: nn.Module, ranks: Mapping[str, int], refit: bool, damping: float) -> BlockEdit:
    """An edit that truncates by what the dense model's linears read; the statistic is the second moment.

    Args:
        model: whose linears are edited.
        ranks: by full name.
        refit: fit the left factors, once there are right ones, to what the already truncated blocks give.
        damping: see `compresso.core.low_rank.root_of`.

    Raises as `of_low_rank`.
    """

    def edit(visit: BlockVisit) -> Mapping[str, Any]:
        notes = dict[str, Any]()
        with torch.no_grad():
            for group in visit.groups:
                dense, met = (seen[group.names[0]].total.double() for seen in (visit.seen_dense, visit.seen))
                again = _root(group, met, damping) if refit else None
                notes |= _truncate_(model, group, ranks, _root(group, dense, damping), met, again)
        return notes

    return BlockEdit(edit, Reference.MODEL, looks_dense=True, reads_batches=False)


def _root(group: Group, moment: Tensor, damping: float) -> Root:
    """The root of what a group reads. Raises NumericError, naming its linears, if there is none."""
    try:
        return root_of(moment, damping)
    except NotPositiveDefiniteError as error:
        raise NumericError(
            f"{', '.join(group.names)}: {error}; give more calibration examples, set whiten to none, or add it to"
            " where.ignore"
        ) from error


def _truncate_(
    model: nn.Module,
    group: Group,
    ranks: Mapping[str, int],
    root: Root | None,
    moment: Tensor,
    refit: Root | None = None,
) -> dict[str, Any]:
    """Truncate a group's linears, and note what they lose.

    Args:
        model: whose linears.
        group: them.
        ranks: by full name.
        root: what to whiten by; None for nothing.
        moment: what they read [in, in], float64, by which the loss is told.
        refit: what to fit the left factors to afterwards; None leaves them.
    """
    notes = dict[str, Any]()
    for name in group.names:
        weight = matrix(model, name)
        exact = weight.double()
        found = truncated(exact, ranks[name], None if root is None else root.lower)
        product = found.product if refit is None else refitted(exact, found.right, refit.lower) @ found.right
        weight.copy_(product)
        change = weight.double() - exact
        lost, whole = (float((one @ moment * one).sum()) for one in (change, exact))
        used = [one.damping for one in (root, refit) if one is not None]
        notes[name] = {"error": lost / whole if whole > 0 else 0.0, "damping": max(used) if used else None}
    return notes
