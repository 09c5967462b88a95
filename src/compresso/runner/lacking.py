"""What is said where a stage's budget names kinds of units that a model does not have: the others give their share.

The size that was asked for stays what it is. It is counted over fewer units then, each of which gives more, and whoever
compares families has to know by how much.
"""

from collections.abc import Sequence

import torch

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, lacking, removable
from compresso.core.cost import CostModel
from compresso.core.quantities import QUANTITIES

_WORDS = {
    Kind.HEAD: "heads",
    Kind.QUERY: "query heads that share a key/value head",
    Kind.HEAD_CHANNEL: "channels of heads",
    Kind.CHANNEL: "channels",
    Kind.EXPERT: "experts",
    Kind.EXPERT_CHANNEL: "channels of experts",
    Kind.HIDDEN: "hidden dimensions",
    Kind.LAYER: "whole layers",
    Kind.ATTENTION: "attentions",
    Kind.MLP: "MLPs",
}


def said_of_kinds(family: str, axes: Sequence[Axis], cost: CostModel, budget: Budget) -> str | None:
    """A sentence on the kinds of a budget that a model has no units of, and on what the share is taken of without them;
    None where it has them all.

    Args:
        family: what the model is called.
        axes, cost: of the model that the stage finds.
        budget: of the stage.

    Raises:
        ValueError: it has none of them.

    Example:
        "gpt2 has no hidden dimensions that could leave: keep=0.7 of blocks is met by channels alone, which hold 6,144
        of 9,216 block parameters and keep about 0.55 of them"
    """
    missing = lacking(axes, budget)
    if not missing:
        return None
    pool = removable(axes, budget)
    there = [kind for kind in budget.kinds if kind not in missing]
    dense = float(cost().count(budget.of))
    held = dense - float(cost({axis.name: torch.zeros(axis.size) for axis in pool}).count(budget.of))
    words = QUANTITIES[budget.of]
    share = f" and keep about {max(1 - (1 - budget.keep) * dense / held, 0):.2f} of them" if held else ""
    return (
        f"{family} has no {_and(missing)} that could leave: keep={budget.keep:g} of {budget.of} is met by"
        f" {_and(there)} alone, which hold {words.text(held)} of {words.text(dense)} {words.words}{share}"
    )


def _and(kinds: Sequence[Kind]) -> str:
    """Kinds in words."""
    words = [_WORDS.get(kind, f"{kind}s") for kind in kinds]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
