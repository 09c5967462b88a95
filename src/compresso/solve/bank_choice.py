"""A bank as items of a search: the levels that may be picked, what they cost and spoil, and where a search begins.

Errors of a bank are measured one sub-layer at a time. They rank the widths of a model well, and whole layers badly:
what several missing layers do together is nothing like the sum (EvoPress, Sieberling et al., arXiv 2410.14649). So
`beginnings` lets a few layers leave in an order that somebody else found, and chooses the widths of all others exactly.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from compresso.core.axis import Axis, Kind
from compresso.core.budget import InfeasibleBudget
from compresso.core.plan import Plan
from compresso.core.quantities import Cost, CostName
from compresso.solve import bank as banks
from compresso.solve.bank import Bank, Level, SubLayer
from compresso.solve.level_choice import Choice, Item, Levels, choose_exactly, cost_floor, fits
from compresso.solve.level_costs import priced

STEPS = 12
"""Levels of an FFN, at most; one more for the FFN that is gone."""


@dataclass(frozen=True)
class Menu:
    """What may be picked of each sub-layer.

    Args:
        bank: of the model.
        sub_layers: with a choice, block after block.
        levels: of each, dense first.
    """

    bank: Bank
    sub_layers: tuple[SubLayer, ...]
    levels: tuple[tuple[Level, ...], ...]

    @property
    def dense(self) -> Levels:
        """The levels of the whole model."""
        return (0,) * len(self.sub_layers)

    @property
    def pairs(self) -> list[tuple[int, ...]]:
        """Places of a block's attention and FFN, of the blocks that have both."""
        places: dict[int, list[int]] = {}
        for place, one in enumerate(self.sub_layers):
            places.setdefault(one.layer, []).append(place)
        return [tuple(both) for both in places.values() if len(both) > 1]

    def picked(self, levels: Levels) -> list[tuple[SubLayer, Level]]:
        """Each sub-layer at its level."""
        return [(one, of[n]) for one, of, n in zip(self.sub_layers, self.levels, levels, strict=True)]

    def empty_blocks(self, levels: Levels) -> list[int]:
        """The layers all of whose sub-layers are gone, and which the bank lets leave, ascending."""
        left = {one.layer for one, level in self.picked(levels) if not level.gone}
        left |= {one.layer for one in self.bank.sub_layers.values() if one not in self.sub_layers}
        return [layer for layer in range(self.bank.layers) if layer not in left and layer in self.bank.blocks]

    def plan(self, levels: Levels, *, layers: bool = True) -> Plan:
        """What stays of the model. layers: whether layers that lost all leave; else their sub-layers do."""
        chosen = {one.name: level for one, level in self.picked(levels)}
        return banks.plan(self.bank, chosen, self.empty_blocks(levels) if layers else ())


def menu(bank: Bank, kinds: Collection[Kind], steps: int = STEPS) -> Menu:
    """The levels of a bank that may be picked.

    Args:
        bank: of the model.
        kinds: what may leave: whole attentions and mlps, heads (key/value heads with their query heads), query heads
            (as many of every key/value head) and channels.
        steps: levels of an FFN, at most, evenly spaced in multiples of 16 channels; key/value heads have every one.
    """
    found = [(one, of) for one in bank.sub_layers.values() if len(of := _levels(one, kinds, steps)) > 1]
    return Menu(bank, tuple(one for one, _ in found), tuple(of for _, of in found))


def grid_of(size: int, steps: int) -> int:
    """Channels between two levels of an FFN with so many, and those of its smallest level."""
    return -(-size // steps // banks.GRID) * banks.GRID


def _levels(sub_layer: SubLayer, kinds: Collection[Kind], steps: int) -> tuple[Level, ...]:
    channels = sub_layer.kind == Kind.MLP
    size = len(sub_layer.ladders[0].order) if sub_layer.ladders else 0
    grid = grid_of(size, steps) if channels else 1
    inner = (Kind.CHANNEL if channels else Kind.HEAD) in kinds

    def may(level: Level) -> bool:
        if level.gone:
            return sub_layer.kind in kinds
        whole_heads = level.slots == sub_layer.slots or not sub_layer.ladders
        return (inner or level.units == size or not sub_layer.ladders) and (whole_heads or Kind.QUERY in kinds)

    return tuple(level for level in banks.levels(sub_layer, max(grid, 1)) if may(level))


def items(menu: Menu, axes: Sequence[Axis], cost: Cost, of: CostName) -> list[Item]:
    """An item for each sub-layer, whose levels cost 0 when dense, and what the model costs less at others; errors are
    the bank's. axes: all of the model, those of query heads among them.
    """
    return [
        priced(
            one.name,
            [banks.plan(menu.bank, {one.name: level}).masks(axes) for level in levels],
            cost,
            of,
            [level.error for level in levels],
        )
        for one, levels in zip(menu.sub_layers, menu.levels, strict=True)
    ]


def evenly(menu: Menu, items: Sequence[Item], limit: float, gone: Collection[int] = ()) -> Levels:
    """The levels at which all attentions that stay keep one share of their heads and all FFNs one of their channels, of
    least error among those that fit.

    Args:
        menu, items, limit: as `choose_exactly` takes them.
        gone: layers that are gone whole; all others stay.

    Raises:
        InfeasibleBudget: no shares fit.
    """
    shares = [
        [level.units / of[0].units if level.slots == of[0].slots and not level.gone else 0.0 for level in of]
        for of in menu.levels
    ]
    there = {
        kind: {share for one, of in zip(menu.sub_layers, shares, strict=True) if one.kind == kind for share in of}
        for kind in (Kind.ATTENTION, Kind.MLP)
    }
    best, least = None, math.inf
    for chosen in itertools.product(*(sorted({1.0, *of} - {0.0}, reverse=True) for of in there.values())):
        most = dict(zip(there, chosen, strict=True))
        places = [
            _gone(of) if one.layer in gone else _at_most(of_share, most[one.kind])
            for one, of, of_share in zip(menu.sub_layers, menu.levels, shares, strict=True)
        ]
        levels = tuple(place for place in places if place is not None)
        if len(levels) == len(items) and fits(items, levels, limit):
            error = sum(item.errors[n] for item, n in zip(items, levels, strict=True))
            if best is None or error < least:
                best, least = levels, error
    if best is None:
        raise InfeasibleBudget("no share of heads and channels that all layers keep is within the budget; raise keep")
    return best


def _gone(levels: Sequence[Level]) -> int | None:
    """The place of the level at which a sub-layer is gone."""
    return next((n for n, level in enumerate(levels) if level.gone), None)


def _at_most(shares: Sequence[float], most: float) -> int:
    """The place of the largest share up to `most`, or of the smallest there is."""
    there = [n for n, share in enumerate(shares) if share]
    return next((n for n in there if shares[n] <= most), there[-1])


def beginnings(
    menu: Menu, items: Sequence[Item], limit: float, order: Sequence[int], most: int, *, even: bool = False
) -> list[Levels]:
    """Choices within a limit with no layer gone, with the first few of `order` gone, ... until they alone are enough;
    the levels of all sub-layers that stay are the exact choice by the bank's errors.

    Args:
        menu, items, limit: as `choose_exactly` takes them.
        order: layers in the order in which they leave, the least missed first.
        most: how many choices, evenly spaced over the numbers of layers.
        even: whether all layers that stay keep as many heads and channels; see `evenly`.

    Raises:
        InfeasibleBudget: none is within the limit.
    """
    cost_floor(items, limit)
    found: list[Levels] = []
    for n in range(len(order) + 1):
        gone = set(order[:n])
        held = [_held(one, item, of, gone) for one, item, of in zip(menu.sub_layers, items, menu.levels, strict=True)]
        try:
            found.append(evenly(menu, items, limit, gone) if even else choose_exactly(held, limit).levels)
        except InfeasibleBudget:
            continue
        if all(not level for one, level in zip(menu.sub_layers, found[-1], strict=True) if one.layer not in gone):
            break  # nothing else has to leave
    if not found and even:
        raise InfeasibleBudget("no number of layers and one width for all others is within the budget; raise keep")
    if not found:
        found = [_some_stay(menu, items, limit)]
    spread = {round(i * (len(found) - 1) / max(most - 1, 1)) for i in range(most)}
    return list(dict.fromkeys(found[i] for i in sorted(spread)))


def _some_stay(menu: Menu, items: Sequence[Item], limit: float) -> Levels:
    """The choice of least error in which not all layers are gone."""
    free = choose_exactly(items, limit).levels
    if len(menu.empty_blocks(free)) < menu.bank.layers:
        return free
    found: list[Choice] = []
    for stays, of in enumerate(menu.levels):
        able = [n for n, level in enumerate(of) if not level.gone]
        try:
            found.append(choose_exactly([*items[:stays], _only(items[stays], able), *items[stays + 1 :]], limit))
        except InfeasibleBudget:
            continue
    if not found:
        raise InfeasibleBudget("within the budget no attention and no FFN is left in any layer; raise keep")
    return min(found, key=lambda choice: choice.error).levels


def alone(menu: Menu, items: Sequence[Item], limit: float, order: Sequence[int]) -> int:
    """How many layers of `order`, the first ones, are enough with all others whole; all of them where they are not."""
    places = [_gone(of) for of in menu.levels]
    for n in range(len(order)):
        gone = set(order[:n])
        levels = tuple(
            place or 0 if one.layer in gone else 0 for one, place in zip(menu.sub_layers, places, strict=True)
        )
        if fits(items, levels, limit):
            return n
    return len(order)


def near(
    menu: Menu, items: Sequence[Item], limit: float, kept: Mapping[str, int], gone: Collection[int] = ()
) -> Levels:
    """The choice of least error among levels a step from so many units; more steps where these fit no limit. All other
    sub-layers and query heads stay.

    Args:
        menu, items, limit: as `choose_exactly` takes them.
        kept: units by the name of their axis; all where it is not named.
        gone: layers that are gone whole.

    Raises:
        InfeasibleBudget: no widths fit.
    """
    there = [
        [n for n, level in enumerate(of) if (level.gone if one.layer in gone else _all_slots(level, of))]
        for one, of in zip(menu.sub_layers, menu.levels, strict=True)
    ]
    if not all(there):
        raise InfeasibleBudget("a layer that is to be gone has a part that may not leave; name attention and mlp")
    nearest = [
        min(range(len(places)), key=lambda i: abs(of[places[i]].units - kept.get(one.units or "", of[0].units)))
        for one, of, places in zip(menu.sub_layers, menu.levels, there, strict=True)
    ]
    for steps in range(1, max(map(len, there), default=0) + 1):
        allowed = [set(places[max(i - steps, 0) : i + steps + 1]) for i, places in zip(nearest, there, strict=True)]
        held = [_only(item, able) for item, able in zip(items, allowed, strict=True)]
        try:
            return choose_exactly(held, limit).levels
        except InfeasibleBudget:
            continue
    raise InfeasibleBudget("no widths of heads and channels alone are within the budget; raise keep")


def _all_slots(level: Level, of: Sequence[Level]) -> bool:
    """Whether a sub-layer is there with all of its query heads."""
    return not level.gone and level.slots == of[0].slots


def _only(item: Item, able: Collection[int]) -> Item:
    """An item that has some of its levels alone."""
    return replace(item, errors=tuple(error if n in able else math.inf for n, error in enumerate(item.errors)))


def _held(sub_layer: SubLayer, item: Item, levels: Sequence[Level], gone: Collection[int]) -> Item:
    """An item that is gone, or that may be anything but gone."""
    wanted = sub_layer.layer in gone
    errors = (error if level.gone == wanted else math.inf for level, error in zip(levels, item.errors, strict=True))
    return replace(item, errors=tuple(errors))
