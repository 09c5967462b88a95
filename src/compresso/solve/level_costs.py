"""What levels cost, asked of any cost: counted by formula or looked up in a table of milliseconds.

A level is what it masks: axis -> [size]. Its cost is what the model costs under these masks alone, less what it costs
whole. Where levels of different items share something (a norm that leaves with the last of two), or floats round, the
levels together cost something else than the sum; so the choice is measured as a whole, and the limit is lowered until
that is within it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from compresso.core.quantities import Cost, CostName
from compresso.solve.level_choice import Choice, Item, Levels, choose_exactly

Masks = Mapping[str, Tensor]
"""Axis name -> [size], 0 or 1; axes that are not named are whole."""

ATTEMPTS = 16
"""How often the limit is lowered before the choice is given up."""


def priced(name: str, levels: Sequence[Masks], cost: Cost, of: CostName, errors: Sequence[float] = ()) -> Item:
    """An item whose levels are masks, with the cost of each above the whole model's: 0 for a level that masks nothing,
    else below it.
    """
    dense = float(cost().count(of))
    return Item(name, tuple(float(cost(masks).count(of)) - dense for masks in levels), tuple(errors))


def stitched(masks: Sequence[Sequence[Masks]], levels: Levels) -> dict[str, Tensor]:
    """The masks of all chosen levels together; where several mask one axis, a unit stays if all keep it."""
    together: dict[str, Tensor] = {}
    for of_item, level in zip(masks, levels, strict=True):
        for axis, mask in of_item[level].items():
            together[axis] = together[axis] * mask if axis in together else mask
    return together


def choose_priced(
    items: Sequence[Item], masks: Sequence[Sequence[Masks]], cost: Cost, of: CostName, limit: float
) -> Choice:
    """The levels of least error whose model is measured to cost no more than the limit.

    Args:
        items: as `priced` makes them, with errors.
        masks: of each item's levels.
        cost, of: what measures the model.
        limit: what the model may cost, such as `Budget.limit` says.

    Returns:
        The choice; its cost is the measured model's.

    Raises:
        InfeasibleBudget: the cheapest levels cost more.
        ValueError: the model of every choice costs more than its levels do alone.
    """
    dense = float(cost().count(of))
    room = limit - dense
    for _ in range(ATTEMPTS):
        choice = choose_exactly(items, room)
        found = float(cost(stitched(masks, choice.levels)).count(of))
        if found <= limit:
            return replace(choice, cost=found)
        room = min(room, choice.cost) - 2 * (found - limit)
    raise ValueError(
        f"no choice within {limit:.6g} was found in {ATTEMPTS} attempts, since levels cost more together than alone;"
        " raise keep"
    )
