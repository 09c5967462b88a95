"""The table against brute force on small random cases: the optimum, within the limit, the same on every run."""

import itertools
import math
import random

import pytest
import torch

from compresso.core.budget import InfeasibleBudget
from compresso.solve.level_choice import Item, choose_exactly, cost_of, fits


def brute(items: list[Item], limit: float) -> tuple[float, tuple[int, ...]] | None:
    """The least error within the limit, and the lowest of the levels that have it; errors added last item first."""
    best: tuple[float, tuple[int, ...]] | None = None
    for levels in itertools.product(*(range(len(item.costs)) for item in items)):
        if fits(items, levels, limit):
            error = 0.0
            for item, level in zip(reversed(items), reversed(levels), strict=True):
                error = item.errors[level] + error
            if best is None or error < best[0]:
                best = error, levels
    return best


def drawn(seed: int, whole: bool) -> tuple[list[Item], float]:
    """Up to five items of up to four levels, with ties, levels that cost more and do worse, and forbidden ones."""
    draw = random.Random(seed)
    items = []
    for i in range(draw.randint(1, 5)):
        n = draw.randint(1, 4)
        costs = [draw.randint(0, 12) if whole else draw.uniform(0, 12) for _ in range(n)]
        errors = [
            draw.choice([draw.randint(0, 3), draw.random(), math.inf if draw.random() < 0.1 else 1]) for _ in costs
        ]
        items.append(Item(f"item {i}", tuple(map(float, costs)), tuple(map(float, errors))))
    floor, most = (sum(f(item.costs) for item in items) for f in (min, max))
    return items, draw.randint(int(floor), int(most)) if whole else draw.uniform(floor, most)


@pytest.mark.parametrize("seed", range(300))
def test_the_choice_is_that_of_brute_force(seed: int) -> None:
    items, limit = drawn(seed, whole=True)
    if not fits(items, tuple(min(range(len(i.costs)), key=lambda n, i=i: i.costs[n]) for i in items), limit):
        limit = math.ceil(sum(min(item.costs) for item in items))
    expected = brute(items, limit)
    if expected is None or math.isinf(expected[0]):
        with pytest.raises(InfeasibleBudget, match="finite errors"):
            choose_exactly(items, limit)
        return
    found = choose_exactly(items, limit)
    assert found.exact and (found.error, found.levels) == expected
    assert found.cost == sum(item.costs[level] for item, level in zip(items, found.levels, strict=True)) <= limit


@pytest.mark.parametrize("seed", range(200))
def test_costs_of_any_size_stay_within_the_limit_and_lose_less_than_a_step_an_item(seed: int) -> None:
    items, limit = drawn(seed, whole=False)
    step = limit / 400
    allowed = brute(items, limit - step * len(items))
    best = brute(items, limit)
    if best is None or math.isinf(best[0]) or allowed is None or math.isinf(allowed[0]):
        return
    found = choose_exactly(items, limit, step)
    assert not found.exact or len(items) == 1 or all(len(set(item.costs)) == 1 for item in items)
    assert fits(items, found.levels, limit) and found.cost == cost_of(items, found.levels)
    assert best[0] <= found.error <= allowed[0] + 1e-12


def test_a_full_budget_is_used_to_the_last_unit() -> None:
    """Sums of tenths are not whole in binary: a limit of their exact sum admits them, one below it does not."""
    items = [Item(f"item {i}", (0.1, 0.0), (0.0, 1.0)) for i in range(10)]
    exactly = cost_of(items, (0,) * 10)
    assert choose_exactly(items, math.nextafter(exactly, 2)).error == 0
    assert choose_exactly(items, math.nextafter(exactly, 0)).error == 1
    assert choose_exactly([Item("a", (3.0, 1.0), (0.0, 1.0))], 3.0).levels == (0,)


def test_the_step_is_the_common_measure_where_there_is_one() -> None:
    sizes = [(442_368.0 * 2, 0.0), (2_654_208.0, 0.0)] * 30
    items = [Item(f"item {i}", costs, (0.0, float(i % 7) + 1)) for i, costs in enumerate(sizes)]
    found = choose_exactly(items, 0.8 * sum(costs[0] for costs in sizes))
    assert (found.exact, found.resolution) == (True, 884_736.0)
    rough = choose_exactly([Item("a", (math.pi, 0.0), (0.0, 1.0)), Item("b", (math.e, 0.0), (0.0, 2.0))], 3.0)
    assert not rough.exact and rough.levels == (1, 0)


def test_equal_errors_go_to_the_lowest_levels_of_the_first_items() -> None:
    items = [Item(name, (1.0, 1.0, 0.0), (2.0, 2.0, 5.0)) for name in "abc"]
    assert choose_exactly(items, 2.0).levels == (0, 0, 2)
    assert choose_exactly(items, 3.0).levels == (0, 0, 0)


def test_what_rounding_left_over_is_spent() -> None:
    """With a step of the whole budget the table sees two levels that do not fit together, and they do."""
    items = [Item("a", (0.4, 0.0), (0.0, 2.0)), Item("b", (0.5, 0.0), (0.0, 1.0))]
    assert choose_exactly(items, 1.0, 1.0).levels == (0, 0)


def test_bad_input_is_named() -> None:
    items = [Item("a", (3.0, 2.0), (0.0, 1.0)), Item("b", (4.0, 2.5), (0.0, 1.0))]
    with pytest.raises(InfeasibleBudget, match=r"cheapest levels cost 4\.5, more than 4; raise keep"):
        choose_exactly(items, 4.0)
    with pytest.raises(ValueError, match="a has 2 costs and 1 errors"):
        Item("a", (1.0, 2.0), (0.0,))
    with pytest.raises(ValueError, match="a has a cost that is not finite"):
        Item("a", (math.nan,), (0.0,))
    with pytest.raises(ValueError, match="b has no errors"):
        choose_exactly([items[0], Item("b", (1.0,))], 9.0)
    with pytest.raises(ValueError, match="resolution=0 is no step"):
        choose_exactly(items, 9.0, 0)
    assert choose_exactly([], 1.0).levels == ()


def test_floats_and_tensors_of_measured_costs_are_summed_exactly() -> None:
    costs = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).double().tolist()
    items = [Item(f"item {i}", tuple(row), (0.0, 0.5, 1.0)) for i, row in enumerate(costs)]
    limit = sum(map(min, costs)) * 1.3
    assert fits(items, choose_exactly(items, limit).levels, limit)
