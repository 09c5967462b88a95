"""Menus, even shares and beginnings of a made-up bank: within the limit, exact, and only what may leave."""

import itertools
import math
from collections.abc import Sequence

import pytest

from compresso.core.axis import Kind
from compresso.core.budget import InfeasibleBudget
from compresso.solve.bank import Bank, Ladder, Level, SubLayer
from compresso.solve.bank_choice import Menu, beginnings, evenly, menu, near
from compresso.solve.level_choice import Item, Levels, cost_of, fits

ALL = (Kind.ATTENTION, Kind.MLP, Kind.HEAD, Kind.QUERY, Kind.CHANNEL)


def attention(layer: int) -> SubLayer:
    """Two key/value heads of two query heads."""
    ladders = (Ladder(2, (1, 0), (0.0, 1.0 + layer, 4.0)), Ladder(1, (0, 1), (2.0, 3.0 + layer, 4.0)))
    return SubLayer(layer, Kind.ATTENTION, "o", f"layers.{layer}.heads", 4, 2, 1, ladders, ((0,), (1,)), 4.5, 0.01)


def mlp(layer: int, size: int = 96) -> SubLayer:
    ladder = Ladder(1, tuple(range(size)), tuple((i / 16) ** 2 * (1 + layer) for i in range(size + 1)))
    return SubLayer(layer, Kind.MLP, "down", f"layers.{layer}.channels", 1, 1, 0, (ladder,), (), 60.0, 0.01)


def made_up(layers: int = 3) -> Bank:
    found = [one for layer in range(layers) for one in (attention(layer), mlp(layer))]
    return Bank({}, layers, {one.name: one for one in found}, dict.fromkeys(range(layers), 1.0))


def priced(choice: Menu) -> list[Item]:
    """Costs that are the shares that stay: 100 an attention, 200 an FFN."""

    def cost(one: SubLayer, units: int, slots: int) -> float:
        whole = 100 if one.kind == Kind.ATTENTION else 200
        return whole * (units * slots / (len(one.ladders[0].order) * one.slots) - 1)

    return [
        Item(one.name, tuple(cost(one, of.units, of.slots) for of in levels), tuple(of.error for of in levels))
        for one, levels in zip(choice.sub_layers, choice.levels, strict=True)
    ]


def sizes(choice: Menu, place: int) -> list[tuple[int, int]]:
    return [(level.units, level.slots) for level in choice.levels[place]]


def test_a_menu_holds_what_may_leave_and_nothing_else() -> None:
    bank = made_up()
    whole = menu(bank, ALL, steps=3)
    assert sizes(whole, 0) == [(2, 2), (1, 2), (2, 1), (1, 1), (0, 0)]
    assert sizes(whole, 1) == [(96, 1), (64, 1), (32, 1), (0, 0)]
    assert sizes(menu(bank, ALL, steps=100), 1) == [(n, 1) for n in range(96, 0, -16)] + [(0, 0)]
    assert sizes(menu(bank, (Kind.HEAD, Kind.CHANNEL), steps=3), 0) == [(2, 2), (1, 2)]
    assert sizes(menu(bank, (Kind.QUERY,), steps=3), 0) == [(2, 2), (2, 1)]
    depth = menu(bank, (Kind.ATTENTION, Kind.MLP))
    assert sizes(depth, 0) == [(2, 2), (0, 0)] and sizes(depth, 1) == [(96, 1), (0, 0)]
    channels = menu(bank, (Kind.CHANNEL,))
    assert [one.kind for one in channels.sub_layers] == [Kind.MLP] * 3
    assert channels.empty_blocks((channels.levels[0].__len__() - 1,) * 3) == []  # their attentions stay


def test_blocks_without_anything_are_layers_in_the_plan() -> None:
    choice = menu(made_up(), ALL, steps=3)
    levels = (4, 3, 1, 0, 0, 3)
    assert choice.empty_blocks(levels) == [0] and choice.pairs == [(0, 1), (2, 3), (4, 5)]
    assert choice.plan(levels).kept == {"layers": (1, 2), "layers.1.heads": (0,), "mlp": (0, 1)}
    flat = choice.plan(levels, layers=False).kept
    assert flat["attention"] == (1, 2) and flat["mlp"] == (1,) and "layers" not in flat


def even(choice: Menu, levels: Levels, gone: set[int]) -> bool:
    """Whether layers are gone whole and all others keep as much of each kind."""
    kept: dict[Kind, set[tuple[int, int]]] = {Kind.ATTENTION: set(), Kind.MLP: set()}
    for one, level in choice.picked(levels):
        if level.gone != (one.layer in gone):
            return False
        if not level.gone:
            kept[one.kind].add((level.units, level.slots))
    return all(len(of) == 1 for of in kept.values()) and {slots for _, slots in kept[Kind.ATTENTION]} == {2}


@pytest.mark.parametrize("share", [1.0, 0.9, 0.75, 0.5, 0.4])
@pytest.mark.parametrize("gone", [set[int](), {1}])
def test_even_shares_are_the_best_that_fit(share: float, gone: set[int]) -> None:
    choice = menu(made_up(), ALL, steps=3)
    items, limit = priced(choice), -900 * (1 - share)
    levels = evenly(choice, items, limit, gone)
    assert fits(items, levels, limit) and even(choice, levels, gone)
    tried = itertools.product(*(range(len(item.costs)) for item in items))
    least = min(total(items, one) for one in tried if even(choice, one, gone) and fits(items, one, limit))
    assert total(items, levels) == pytest.approx(least)
    if share == 1.0 and not gone:
        assert levels == choice.dense


def test_even_shares_that_no_layer_can_lose_are_infeasible() -> None:
    choice = menu(made_up(), ALL, steps=3)
    with pytest.raises(InfeasibleBudget, match="raise keep"):
        evenly(choice, priced(choice), -880)


def best(choice: Menu, items: Sequence[Item], limit: float, gone: set[int]) -> float:
    """The least error with exactly these layers gone, by trying everything."""

    def may(levels: Levels) -> bool:
        return all(level.gone == (one.layer in gone) for one, level in choice.picked(levels))

    tried = itertools.product(*(range(len(item.costs)) for item in items))
    return min((total(items, one) for one in tried if may(one) and fits(items, one, limit)), default=math.inf)


def total(items: Sequence[Item], levels: Levels) -> float:
    return sum(item.errors[n] for item, n in zip(items, levels, strict=True))


def test_each_beginning_is_the_best_with_its_layers_gone() -> None:
    choice = menu(made_up(), ALL, steps=3)
    items, limit = priced(choice), -450.0
    found = beginnings(choice, items, limit, [2, 0], most=9)
    assert [choice.empty_blocks(levels) for levels in found] == [[], [2], [0, 2]]
    for levels, gone in zip(found, [set[int](), {2}, {0, 2}], strict=True):
        assert cost_of(items, levels) <= limit
        assert total(items, levels) == pytest.approx(best(choice, items, limit, gone))
    assert beginnings(choice, items, limit, [2, 0], most=2) == [found[0], found[2]]
    assert beginnings(choice, items, limit, [2, 0], most=1) == [found[0]]


def test_even_beginnings_have_one_width(share: float = 0.5) -> None:
    choice = menu(made_up(), ALL, steps=3)
    found = beginnings(choice, priced(choice), -900 * (1 - share), [2, 0], most=9, even=True)
    assert len(found) == 3
    assert all(even(choice, levels, set(choice.empty_blocks(levels))) for levels in found)
    with pytest.raises(InfeasibleBudget, match="one width for all others"):
        beginnings(choice, priced(choice), -899.0, [2], most=9, even=True)


def test_beginnings_end_where_layers_alone_are_enough_and_skip_what_cannot_fit() -> None:
    choice = menu(made_up(), ALL, steps=3)
    items = priced(choice)
    assert len(beginnings(choice, items, -300.0, [1, 2], most=9)) == 2
    few = beginnings(choice, items, -800.0, [1, 2], most=9)
    assert [choice.empty_blocks(levels) for levels in few] == [[1, 2]]
    only = menu(made_up(), (Kind.CHANNEL,), steps=3)
    assert len(beginnings(only, priced(only), -200.0, [1, 2], most=9)) == 1
    with pytest.raises(InfeasibleBudget, match="cheapest levels"):
        beginnings(only, priced(only), -500.0, [], most=9)


def test_widths_near_others_are_the_best_of_those_a_step_away_and_take_no_whole_part() -> None:
    choice = menu(made_up(), ALL, steps=100)
    items, wanted = priced(choice), {"layers.0.channels": 32, "layers.1.channels": 64, "layers.2.heads": 1}
    limit = -360.0
    levels = near(choice, items, limit, wanted)
    assert fits(items, levels, limit)
    picked = {one.name: level for one, level in choice.picked(levels)}
    assert not any(level.gone for level in picked.values())
    assert all(level.slots == one.slots for one, level in choice.picked(levels))

    def options(one: SubLayer, of: Sequence[Level]) -> list[int]:
        there = [n for n, level in enumerate(of) if not level.gone and level.slots == one.slots]
        units = wanted.get(one.units or "", of[0].units)
        at = min(range(len(there)), key=lambda i: abs(of[there[i]].units - units))
        return there[max(at - 1, 0) : at + 2]

    tried = itertools.product(*(options(*both) for both in zip(choice.sub_layers, choice.levels, strict=True)))
    errors = [sum(i.errors[n] for i, n in zip(items, one, strict=True)) for one in tried if fits(items, one, limit)]
    assert sum(item.errors[n] for item, n in zip(items, levels, strict=True)) == pytest.approx(min(errors))


def test_widths_go_farther_where_a_step_is_not_enough_and_say_so_where_none_fit() -> None:
    choice = menu(made_up(), ALL, steps=100)
    items = priced(choice)
    levels = near(choice, items, -500.0, {})  # nothing asked to leave
    assert fits(items, levels, -500.0) and not any(level.gone for _, level in choice.picked(levels))
    with pytest.raises(InfeasibleBudget, match="widths of heads and channels alone"):
        near(choice, items, -800.0, {})


def test_a_layer_stays_where_the_cheapest_levels_are_none() -> None:
    choice = menu(made_up(), ALL, steps=3)
    costs = priced(choice)
    whole = sum(min(item.costs) for item in costs)
    (found,) = beginnings(choice, costs, whole + 30, order=(), most=3)  # an attention of one head takes 25
    assert len(choice.empty_blocks(found)) == 2
    left = [one.name for one, level in choice.picked(found) if not level.gone]
    assert len(left) == 1 and fits(costs, found, whole + 30)
    able = [
        total(costs, levels)
        for levels in itertools.product(*(range(len(of)) for of in choice.levels))
        if fits(costs, levels, whole + 30) and len(choice.empty_blocks(levels)) < 3
    ]
    assert total(costs, found) == min(able)
    with pytest.raises(InfeasibleBudget, match="no attention and no FFN is left in any layer; raise keep"):
        beginnings(choice, costs, whole + 10, order=(), most=3)


def test_widths_near_others_leave_the_layers_out_that_are_gone() -> None:
    choice = menu(made_up(), ALL, steps=3)
    costs = priced(choice)
    wanted = {one.units or "": 1 if one.kind == Kind.ATTENTION else 64 for one in choice.sub_layers}
    levels = near(choice, costs, -300.0, wanted, gone=(1,))
    assert choice.empty_blocks(levels) == [1] and fits(costs, levels, -300.0)
    with pytest.raises(InfeasibleBudget, match="a part that may not leave; name attention and mlp"):
        inner = menu(made_up(), (Kind.HEAD, Kind.CHANNEL), steps=3)
        near(inner, priced(inner), -300.0, wanted, gone=(1,))
