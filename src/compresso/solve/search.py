"""From levels and a fitness to a level of each item, by name: what a bank of levels is handed to.

none    the start, as it is given
dp      what each level does alone, added up, and the least of the sums (`compresso.solve.level_choice`)
evolve  evolution from the better of the two (`compresso.solve.evolve`)
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import StrEnum

from compresso.core.budget import InfeasibleBudget
from compresso.errors import NumericError
from compresso.solve.evolve import Evolution, Evolved, Fitness, evolve
from compresso.solve.level_choice import Item, Levels, choose_exactly, cost_floor, fits


class Search(StrEnum):
    """How levels are chosen."""

    NONE = "none"
    DP = "dp"
    EVOLVE = "evolve"


def search_levels(
    how: Search,
    items: Sequence[Item],
    limit: float,
    start: Levels | None,
    fitness: Fitness,
    evolution: Evolution,
    *,
    seed: int,
    together: Sequence[Sequence[int]] = (),
    adopted: Callable[[Levels], None] = lambda _: None,
) -> Evolved:
    """Choose a level of each item.

    Args:
        how: see the header.
        items: with errors, unless `how` is "none"; `with_errors` measures them.
        start: levels within the limit; None for those that "dp" chooses.
        limit, fitness, evolution, seed, together, adopted: as `evolve` takes them. "none" and "dp" ask for the fitness
            of what they choose, on the largest set.

    Raises:
        InfeasibleBudget: the limit is below the cheapest levels, or `start` above it.
        NumericError: no choice within the limit, or not the best one found, has a fitness that is finite.
        ValueError: as `choose_exactly` and `evolve` do, and for "none" without a start.
    """
    if start is not None and not fits(items, start, limit):
        raise InfeasibleBudget(f"the start costs more than {limit:.6g}; give one within the budget")
    known: dict[tuple[Levels, int], float] = {}

    def tried(levels: Levels, stage: int) -> float:
        if (levels, stage) not in known:
            value = fitness(levels, stage)
            known[levels, stage] = math.inf if math.isnan(value) else value
        return known[levels, stage]

    chosen = start if how == Search.NONE else _exact(items, limit)
    if chosen is None:
        raise ValueError("search=none takes the start as it is; give one, or search: dp")
    alone = replace(evolution, generations=0)
    found = evolve(items, limit, chosen, tried, alone, seed=seed)
    if how == Search.EVOLVE:
        other = found if start is None else evolve(items, limit, start, tried, alone, seed=seed)
        parent = min(found, other, key=lambda one: one.fitness).levels
        found = evolve(items, limit, parent, tried, evolution, seed=seed, together=together, adopted=adopted)
    if not math.isfinite(found.fitness):
        raise NumericError("no candidate of the search predicts anything finite; use float32 or bfloat16")
    last = [(levels, value) for (levels, stage), value in known.items() if stage == evolution.last]
    n_tried = tuple(sum(stage == one for _, stage in known) for one in range(evolution.stages))
    return replace(found, finalists=tuple(sorted(last, key=lambda one: one[1])), tried=n_tried)


def _exact(items: Sequence[Item], limit: float) -> Levels:
    """The exact choice. Raises InfeasibleBudget, or NumericError where it is not the budget that forbids all."""
    cost_floor(items, limit)
    try:
        return choose_exactly(items, limit).levels
    except InfeasibleBudget as error:
        raise NumericError(
            f"search: {error}; what is left alone predicts nothing finite: use float32 or bfloat16"
        ) from error


def recorded(values: Iterable[float]) -> list[float | None]:
    """Fitness as records hold it: None for what is not finite."""
    return [value if math.isfinite(value) else None for value in values]


def with_errors(items: Sequence[Item], dense: Levels, fitness: Fitness, stage: int = 0) -> list[Item]:
    """The items with the error of each level measured alone: the fitness of a model that is dense but for it.

    Args:
        items: their costs; errors are replaced.
        dense: the level of each item that leaves the model as it is; its error is 0.
        fitness, stage: the model, and its evaluation set; a level at which it is no number is forbidden.
    """

    def error(place: int, level: int) -> float:
        value = 0.0 if level == dense[place] else fitness((*dense[:place], level, *dense[place + 1 :]), stage)
        return math.inf if math.isnan(value) else value

    return [
        replace(item, errors=tuple(error(place, level) for level in range(len(item.costs))))
        for place, item in enumerate(items)
    ]
