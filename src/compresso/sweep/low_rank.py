"""What a sweep does to linears that get a low rank: truncated, on their own or on what they meet; the product is put in
the weight's place.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compresso.core.low_rank import factored_size, rank_for, root_of, truncated
from compresso.core.obs import NotPositiveDefiniteError
from compresso.errors import NumericError, RecipeError
from compresso.observe.folds import Stats
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
                " to ignore"
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
        moment, notes = seen.total.double(), dict[str, Any]()
        root = None
        if whiten:
            try:
                root = root_of(moment, damping)
            except NotPositiveDefiniteError as error:
                raise NumericError(
                    f"{', '.join(group.names)}: {error}; give more calibration examples, set whiten to none, or add it"
                    " to ignore"
                ) from error
        for name in group.names:
            weight = matrix(model, name)
            exact = weight.double()
            weight.copy_(truncated(exact, ranks[name], None if root is None else root.lower).product)
            change = weight.double() - exact
            lost, whole = (float((one @ moment * one).sum()) for one in (change, exact))
            notes[name] = {
                "error": lost / whole if whole > 0 else 0.0,
                "damping": None if root is None else root.damping,
            }
        return notes

    return edit
