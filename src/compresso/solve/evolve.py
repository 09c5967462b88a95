"""A search for the levels that a model minds least, by evolution under a budget (EvoPress, Sieberling et al.,
arXiv 2410.14649).

What each level does alone does not tell what levels do together, so candidates are tried on the model. One parent has
some offspring; each differs by a few level switches and costs no more than the budget. Offspring are compared on few
tokens, the best of them on more, the last on most, and the best of these takes the parent's place if it is better.

Departures: costs are free, and any item trades with any other; half of the offspring exchange the levels of two items
of equal costs, which keeps the budget to the unit (there, all trade within one kind and size, a level up for a level
down). Items may be switched or exchanged together, such as the two halves of a block. Evaluation sets stay the same
from generation to generation (there, they are drawn anew), so that the best fitness never rises and a candidate met
twice is not tried twice.

The model is a function of candidate and stage; who keeps a journal of it can go on after any candidate, since all else
follows from the seed.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass

from compresso.core.budget import InfeasibleBudget
from compresso.solve.level_choice import Item, Levels, cost_floor, fits, whole_costs

TRIES = 64
"""Draws of an offspring that differs from the parent and its siblings before a generation goes on with fewer."""
EXCHANGED = 0.5
"""How often an offspring exchanges levels of equal items, where there are some that differ."""
FILLED = 0.75
"""How often an offspring spends what its switches left of the budget: mostly, since dearer levels seldom harm."""


class Fitness(Protocol):
    """How far from dense a candidate's model is: lower is better, NaN is worst."""

    def __call__(self, levels: Levels, stage: int, /) -> float:
        """Fitness on the evaluation set of a stage, 0 being the smallest set."""
        ...


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Evolution:
    """How long to search, and how broadly.

    Args:
        generations: of offspring.
        offspring: of a parent, in each.
        survivors: how many stay after each stage but the last; as many stages as these and one more.
        switches: most switches of an offspring, the smaller of two draws.
        patience: generations in a row without anything better before the search ends; None for all generations.
        growth: each stage's evaluation set is so many times larger than that of the stage before.

    Raises:
        ValueError: values out of range.
    """

    generations: int = 60
    offspring: int = 16
    survivors: tuple[int, ...] = (4, 2)
    switches: int = 3
    patience: int | None = None
    growth: int = 4

    def __post_init__(self) -> None:
        """Refuse what selects nobody."""
        ranked = (self.offspring, *self.survivors, 1)
        least = {"generations": 0, "switches": 1, "patience": 1, "growth": 1}
        for name, bound in least.items():
            value: int | None = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}={value}; wanted at least {bound}")
        if any(fewer > more for more, fewer in itertools.pairwise(ranked)):
            raise ValueError(
                f"offspring={self.offspring} and survivors={list(self.survivors)} grow from stage to stage; wanted"
                " fewer at each, at least 1"
            )

    @property
    def stages(self) -> int:
        """Evaluation sets, smallest first."""
        return len(self.survivors) + 1

    def sizes(self, whole: int) -> list[int]:
        """Parts of an evaluation set of so many parts that each stage takes; the last takes all.

        >>> Evolution(survivors=(4, 2), growth=4).sizes(16)
        [1, 4, 16]
        """
        return [max(whole // self.growth ** (self.last - stage), 1) for stage in range(self.stages)]

    @property
    def most(self) -> list[int]:
        """Candidates of all generations that are tried at each stage, at most; without the start."""
        return [self.generations * n for n in (self.offspring, *self.survivors)]

    @property
    def last(self) -> int:
        """The stage of the largest set."""
        return len(self.survivors)


@dataclass(frozen=True)
class Evolved:
    """What a search found.

    Args:
        levels: the best.
        fitness: of it, on the largest set.
        history: best fitness before the first generation and after each; never rises.
        finalists: all that were tried on the largest set, best first, with their fitness; the earlier of equals first.
        tried: candidates that were tried, by stage.
    """

    levels: Levels
    fitness: float
    history: tuple[float, ...]
    finalists: tuple[tuple[Levels, float], ...]
    tried: tuple[int, ...]


def evolve(
    items: Sequence[Item],
    limit: float,
    start: Levels,
    fitness: Fitness,
    how: Evolution,
    *,
    seed: int,
    together: Sequence[Sequence[int]] = (),
    adopted: Callable[[Levels], None] = lambda _: None,
) -> Evolved:
    """Search for the levels of least fitness within a budget.

    Args:
        items: their costs; errors are not looked at.
        limit: what all levels together may cost.
        start: the first parent, within the limit.
        fitness: the model; asked once for each candidate and stage.
        how: length and breadth.
        seed: of all draws; a generation's draws follow from it and the generation's number.
        together: places of items that may be switched as one.
        adopted: called with each parent before its offspring are tried.

    Raises:
        InfeasibleBudget: the limit is below the cheapest levels, or `start` above the limit.
        ValueError: `start` has not one level of each item.
    """
    cost_floor(items, limit)
    if len(start) != len(items) or any(not 0 <= n < len(item.costs) for n, item in zip(start, items, strict=False)):
        raise ValueError(f"a start of {len(start)} levels for {len(items)} items; wanted one level of each")
    if not fits(items, start, limit):
        raise InfeasibleBudget(f"the start costs more than {limit:.6g}; give one within the budget")
    costs, most = whole_costs(items, limit)
    market = _Market(costs, most, together)
    known: list[dict[Levels, float]] = [{} for _ in range(how.stages)]

    def tried(levels: Levels, stage: int) -> float:
        if levels not in known[stage]:
            value = fitness(levels, stage)
            known[stage][levels] = math.inf if math.isnan(value) else value
        return known[stage][levels]

    parent, best, waited = start, tried(start, how.last), 0
    history = [best]
    for generation in range(how.generations):
        adopted(parent)
        pool = _offspring(market, parent, how, random.Random(f"{seed} {generation}"))
        for stage, survivors in enumerate((*how.survivors, 1)):
            if len(pool) > survivors or stage == how.last:
                pool = sorted(pool, key=lambda child, stage=stage: tried(child, stage))[:survivors]
        waited += 1
        if pool and tried(pool[0], how.last) < best:
            parent, best, waited = pool[0], tried(pool[0], how.last), 0
        history.append(best)
        if how.patience is not None and waited >= how.patience:
            break
    finalists = sorted(known[how.last].items(), key=lambda one: one[1])
    return Evolved(parent, best, tuple(history), tuple(finalists), tuple(map(len, known)))


def _offspring(market: "_Market", parent: Levels, how: Evolution, draw: random.Random) -> list[Levels]:
    """Different children of a parent, all within the limit; fewer than asked for where no more are found."""
    found: dict[Levels, None] = {}
    for _ in range(how.offspring):
        for _ in range(TRIES):
            child = market.mutated(parent, how.switches, draw)
            if child is not None and child != parent and child not in found:
                found[child] = None
                break
    return list(found)


@dataclass(frozen=True)
class _Market:
    """What items may trade.

    Args:
        costs: of each item's levels, whole numbers.
        limit: what all levels together may cost.
        together: places of items that may be switched as one.
    """

    costs: Sequence[Sequence[int]]
    limit: int
    together: Sequence[Sequence[int]]

    def mutated(self, parent: Levels, switches: int, draw: random.Random) -> Levels | None:
        """A parent with a few items switched to other levels, and others after them so that the budget holds, or with
        the levels of equal items exchanged; None where the budget does not hold.
        """
        child, moved = list(parent), set[int]()
        if draw.random() < EXCHANGED and self._exchange(child, draw):
            return tuple(child)
        for _ in range(min(draw.randint(1, switches), draw.randint(1, switches))):
            self._switch(child, moved, draw)
        left = self.limit - sum(costs[n] for costs, n in zip(self.costs, child, strict=True))
        while left < 0:
            cheaper = [
                (place, n)
                for place, costs in enumerate(self.costs)
                if place not in moved
                for n, cost in enumerate(costs)
                if cost < costs[child[place]]
            ]
            if not cheaper:
                return None
            place, n = cheaper[draw.randrange(len(cheaper))]
            left += self.costs[place][child[place]] - self.costs[place][n]
            child[place] = n
        if draw.random() < FILLED:
            self._fill(child, left, moved, draw)
        return tuple(child)

    def _exchange(self, child: list[int], draw: random.Random) -> bool:
        """Exchange the levels of two items of equal costs, or of two groups of these; whether any differ."""
        units: list[Sequence[int]] = [(place,) for place in range(len(child))]
        if self.together and draw.random() < 0.5:
            units = list(self.together)
        draw.shuffle(units)
        for i, first in enumerate(units):
            for second in units[i + 1 :]:
                alike = [self.costs[place] for place in first] == [self.costs[place] for place in second]
                if alike and [child[place] for place in first] != [child[place] for place in second]:
                    for a, b in zip(first, second, strict=True):
                        child[a], child[b] = child[b], child[a]
                    return True
        return False

    def _switch(self, child: list[int], moved: set[int], draw: random.Random) -> None:
        """Switch one item, or some that go together, to dearer levels or to cheaper ones, and note which moved."""
        unit: Sequence[int] = (draw.randrange(len(self.costs)),)
        if self.together and draw.random() < 0.5:
            unit = self.together[draw.randrange(len(self.together))]
        sign = draw.choice((1, -1))
        for place in unit:
            costs, now = self.costs[place], child[place]
            others = [n for n, cost in enumerate(costs) if n != now and sign * (cost - costs[now]) >= 0]
            if others and place not in moved:
                child[place] = others[draw.randrange(len(others))]
                moved.add(place)

    def _fill(self, child: list[int], left: int, moved: set[int], draw: random.Random) -> None:
        """Switch items to the dearest levels that still fit, in random order; those that were switched stay."""
        places = [place for place in range(len(child)) if place not in moved]
        draw.shuffle(places)
        for place in places:
            costs, now = self.costs[place], child[place]
            dearer = [n for n, cost in enumerate(costs) if costs[now] < cost <= costs[now] + left]
            if dearer:
                child[place] = max(dearer, key=lambda n, costs=costs: costs[n])
                left -= costs[child[place]] - costs[now]
