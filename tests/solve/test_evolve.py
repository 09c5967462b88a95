"""Evolution on planted problems whose optimum brute force knows, and the laws of a search."""

import itertools
import random
from collections.abc import Callable

import pytest

from compresso.core.budget import InfeasibleBudget
from compresso.errors import NumericError
from compresso.solve.evolve import Evolution, evolve
from compresso.solve.level_choice import Item, Levels, choose_exactly, cost_of, fits
from compresso.solve.search import Search, search_levels, with_errors

LONG = Evolution(generations=150, offspring=8, survivors=(4, 2))
Problem = tuple[list[Item], float, Levels, Callable[[Levels, int], float]]


def problem(seed: int, pairs: float = 0.0, n: int = 6) -> Problem:
    """Items of unequal costs with errors that add up, and, with `pairs`, errors of levels that go ill together."""
    draw = random.Random(seed)
    items = []
    for i in range(n):
        dense = draw.randint(3, 9)
        errors = (0.0, draw.random(), 1 + draw.random())
        items.append(Item(f"item {i}", (float(dense), float(dense - 2), 0.0), errors))
    ill = {(i, j): pairs * draw.uniform(-1, 2) for i, j in itertools.combinations(range(n), 2)}

    def error(levels: Levels, stage: int) -> float:
        alone = sum(item.errors[level] for item, level in zip(items, levels, strict=True))
        both = sum(value for (i, j), value in ill.items() if levels[i] and levels[j])
        return alone + both + (2 - stage) * 1e-3 * random.Random(str((levels, stage))).random()

    limit = float(int(0.6 * sum(item.costs[0] for item in items)))
    return items, limit, (2,) * n, error


def optimum(items: list[Item], limit: float, error: Callable[[Levels, int], float]) -> float:
    every = itertools.product(*(range(len(item.costs)) for item in items))
    return min(error(levels, 2) for levels in every if fits(items, levels, limit))


@pytest.mark.parametrize("pairs", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_found(seed: int, pairs: float) -> None:
    items, limit, start, error = problem(seed, pairs)
    found = evolve(items, limit, start, error, LONG, seed=seed)
    assert found.fitness == pytest.approx(optimum(items, limit, error)) == error(found.levels, 2)
    if not pairs:
        assert found.fitness == pytest.approx(choose_exactly(items, limit).error)


def test_items_that_only_pay_off_together_are_switched_together() -> None:
    """Both halves of a pair must go for the gain; each alone is worse than nothing."""
    items = [Item(f"half {i}", (1.0, 0.0)) for i in range(8)]

    def error(levels: Levels, _: int) -> float:
        halves = [levels[i : i + 2] for i in range(0, 8, 2)]
        return sum(
            5.0 if sum(pair) == 1 else (0.0 if pair == (1, 1) and i == 3 else sum(pair))
            for i, pair in enumerate(halves)
        )

    pairs = [(i, i + 1) for i in range(0, 8, 2)]
    one = Evolution(generations=40, offspring=4, survivors=(), switches=1)
    assert evolve(items, 6.0, (1, 1, *(0,) * 6), error, one, seed=0, together=pairs).levels == (*(0,) * 6, 1, 1)


def test_levels_of_equal_items_are_exchanged_and_of_others_not() -> None:
    """Half of the offspring of a start that spends the whole budget have its levels in another order, two of them
    exchanged; those of items of other costs stay.
    """
    items = [*(Item(f"small {i}", (2.0, 1.0, 0.0)) for i in range(6)), Item("large", (7.0, 6.5))]
    start: Levels = (0, 0, 0, 1, 2, 2, 0)
    children: list[Levels] = []

    def noted(levels: Levels, _: int) -> float:
        children.append(levels)
        return 0.0 if levels == start else 1.0

    evolve(items, cost_of(items, start), start, noted, Evolution(1, 40, (), switches=1), seed=0)
    changed = [[i for i in range(7) if child[i] != start[i]] for child in children[1:]]
    exchanged = [
        places
        for places, child in zip(changed, children[1:], strict=True)
        if len(places) == 2 and sorted(child) == sorted(start)
    ]
    assert len({tuple(places) for places in exchanged}) == 11  # all pairs of small ones at different levels
    assert not any(6 in places for places in exchanged)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_tried_above_the_budget_and_the_best_never_gets_worse(seed: int) -> None:
    items, limit, start, error = problem(seed, 0.7)
    seen: list[tuple[Levels, int]] = []

    def watched(levels: Levels, stage: int) -> float:
        seen.append((levels, stage))
        return error(levels, stage)

    found = evolve(items, limit, start, watched, LONG, seed=seed)
    assert all(cost_of(items, levels) <= limit for levels, _ in seen)
    assert len(set(seen)) == len(seen) and found.tried == tuple(sum(s == n for _, s in seen) for n in range(3))
    assert list(found.history) == sorted(found.history, reverse=True) and len(found.history) == 151
    assert found.finalists[0] == (found.levels, found.fitness) and found.history[-1] == found.fitness
    assert [value for _, value in found.finalists] == sorted(value for _, value in found.finalists)
    assert found.tried[0] > found.tried[1] > found.tried[2]


def test_the_seed_decides() -> None:
    items, limit, start, error = problem(0, 0.7)
    short = Evolution(generations=4, offspring=4, survivors=(2,))
    runs = [evolve(items, limit, start, error, short, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert runs[0] == runs[1] and len({run.finalists for run in runs}) > 2


def test_survivors_are_the_best_of_the_stage_before() -> None:
    items, limit, start, error = problem(1, 0.7)
    asked: list[tuple[int, Levels, float]] = []

    def watched(levels: Levels, stage: int) -> float:
        asked.append((stage, levels, error(levels, stage)))
        return asked[-1][2]

    evolve(items, limit, start, watched, Evolution(generations=1, offspring=8, survivors=(3, 1)), seed=1)
    by_stage = [[(value, levels) for s, levels, value in asked if s == stage] for stage in range(3)]
    assert [len(one) for one in by_stage] == [8, 3, 2]  # the last stage has the start, too
    assert {levels for _, levels in by_stage[1]} == {levels for _, levels in sorted(by_stage[0])[:3]}
    assert by_stage[2][1][1] == min(by_stage[1])[1]


def test_patience_ends_a_search_that_finds_nothing() -> None:
    items, limit, start, _ = problem(0)
    flat = evolve(items, limit, start, lambda *_: 1.0, Evolution(50, 4, (), patience=3), seed=0)
    assert flat.history == (1.0,) * 4 and flat.levels == start


def test_a_candidate_without_a_number_is_the_worst() -> None:
    items, limit, start, error = problem(0)
    found = evolve(items, limit, start, lambda one, stage: error(one, stage) if one[0] else float("nan"), LONG, seed=0)
    assert found.levels[0] and found.fitness < 100


def test_every_search_is_within_the_budget_and_a_longer_one_is_no_worse() -> None:
    items, limit, start, error = problem(3, 0.7)
    given = with_errors(items, (0,) * 6, error, 2)
    assert all(item.errors[0] == 0 for item in given) and given[0].errors[1] == error((1, 0, 0, 0, 0, 0), 2)
    runs = [search_levels(how, given, limit, start, error, LONG, seed=0) for how in ("none", "dp", "evolve")]  # type: ignore[arg-type]
    assert runs[0].levels == start and runs[1].levels == choose_exactly(given, limit).levels
    assert runs[2].fitness < min(runs[0].fitness, runs[1].fitness)
    assert all(fits(items, run.levels, limit) for run in runs)


def test_a_search_asks_for_no_candidate_twice() -> None:
    items, limit, start, error = problem(2, 0.7)
    asked: list[tuple[Levels, int]] = []

    def watched(levels: Levels, stage: int) -> float:
        asked.append((levels, stage))
        return error(levels, stage)

    search_levels(Search.EVOLVE, items, limit, start, watched, LONG, seed=0)
    assert len(asked) == len(set(asked))


def test_without_a_start_the_exact_choice_is_one() -> None:
    items, limit, start, error = problem(1, 0.7)
    given = with_errors(items, (0,) * 6, error, 2)
    found = search_levels(Search.EVOLVE, given, limit, None, error, LONG, seed=0)
    assert found.history[0] == error(choose_exactly(given, limit).levels, 2) > found.fitness
    with pytest.raises(ValueError, match="search=none takes the start as it is"):
        search_levels(Search.NONE, given, limit, None, error, LONG, seed=0)
    with pytest.raises(NumericError, match="no candidate of the search"):
        search_levels(Search.NONE, given, limit, start, lambda *_: float("nan"), LONG, seed=0)
    bare = with_errors(items, (0,) * 6, lambda *_: float("nan"))
    with pytest.raises(NumericError, match="no levels with finite errors"):
        search_levels(Search.DP, bare, limit, start, error, LONG, seed=0)
    with pytest.raises(InfeasibleBudget, match="cheapest levels cost"):
        search_levels(Search.DP, bare, -1.0, None, error, LONG, seed=0)


def test_bad_input_is_named() -> None:
    items, limit, start, error = problem(0)
    with pytest.raises(InfeasibleBudget, match="the start costs more than"):
        evolve(items, limit, (0,) * 6, error, LONG, seed=0)
    with pytest.raises(InfeasibleBudget, match="cheapest levels cost 0, more than -1"):
        evolve(items, -1.0, start, error, LONG, seed=0)
    with pytest.raises(ValueError, match="a start of 5 levels for 6 items"):
        evolve(items, limit, (2,) * 5, error, LONG, seed=0)
    with pytest.raises(ValueError, match=r"offspring=4 and survivors=\[8\] grow"):
        Evolution(offspring=4, survivors=(8,))
