"""A search for the levels that a model minds least, through the coefficients of a sum of errors (SPDY, Frantar and
Alistarh, arXiv 2201.13096, section 3.2; structured as in ZipLM, Kurtic et al., arXiv 2302.04089, section 3.2).

The error e of each level is known from its sub-layer alone. How much each sub-layer counts is not, so that is what is
searched: for coefficients c the levels are those of

    minimise  sum of c_l e_{l, s_l}    subject to    the budget

which is exact and asks the model nothing, and the model then says what these levels do together. However wrong the
coefficients, the choice is within the budget and on a front of it, so that L numbers are searched, and not every
combination of levels.

First coefficients are all 1, then some are drawn from U(0, 1]. From the best of these a local search draws a tenth of
the coefficients anew, and keeps what is better; after so many failures in a row it draws one fewer, and ends behind
one.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass

from compresso.errors import NumericError
from compresso.solve.evolve import Fitness
from compresso.solve.level_choice import Item, Levels

Choose = Callable[[Sequence[Item]], Levels]
"""The levels of least error within a budget, of items with errors."""


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CoefficientSearch:
    """How long to search, and how broadly.

    Args:
        evaluations: vectors of coefficients that are tried, the first and those drawn whole among them; 1 takes the
            choice by plain errors.
        draws: of these, drawn whole before the local search.
        mutated: share of coefficients that a step of it draws anew, to begin with.
        patience: steps in a row without anything better before one fewer is drawn.

    Raises:
        ValueError: values out of range.
    """

    evaluations: int = 1000
    draws: int = 100
    mutated: float = 0.1
    patience: int = 100

    def __post_init__(self) -> None:
        """Refuse what tries nothing."""
        for name, least in {"evaluations": 1, "draws": 0, "patience": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; wanted at least {least}")
        if not 0 < self.mutated <= 1:
            raise ValueError(f"mutated={self.mutated} is no share of the coefficients; wanted above 0 and at most 1")


@dataclass(frozen=True)
class Weighed:
    """What a search found.

    Args:
        levels: the best.
        fitness: of it.
        coefficients: that chose it, one an item.
        first: fitness of the choice by plain errors.
        history: best fitness so far, wherever it fell; the first is that of plain errors.
        evaluations: vectors that were tried.
        tried: different choices among them, which the model was asked about.
    """

    levels: Levels
    fitness: float
    coefficients: tuple[float, ...]
    first: float
    history: tuple[float, ...]
    evaluations: int
    tried: int


def search_coefficients(
    items: Sequence[Item], choose: Choose, fitness: Fitness, how: CoefficientSearch, *, seed: int
) -> Weighed:
    """Search for the coefficients whose levels have the least fitness.

    Args:
        items: with errors.
        choose: the levels for the items with their errors weighed.
        fitness: the model; asked once for each choice, on its first stage.
        how: length and breadth.
        seed: of all draws.

    Raises:
        InfeasibleBudget: as `choose` does.
        NumericError: no choice has a fitness that is finite.
    """
    draw, known = random.Random(f"{seed} coefficients"), dict[Levels, float]()

    def tried(coefficients: Sequence[float]) -> tuple[float, Levels]:
        levels = choose([_weighed(item, c) for item, c in zip(items, coefficients, strict=True)])
        if levels not in known:
            value = fitness(levels, 0)
            known[levels] = math.inf if math.isnan(value) else value
        return known[levels], levels

    def drawn() -> float:
        return 1 - draw.random()  # above 0, so that every error counts

    best: tuple[float, ...] = (1.0,) * len(items)
    least, levels = tried(best)
    history, n = [least], 1
    changed, failed = max(round(how.mutated * len(items)), 1), 0
    while n < how.evaluations and changed:
        local = n > how.draws
        places = draw.sample(range(len(items)), changed) if local else range(len(items))
        coefficients = list(best)
        for place in places:
            coefficients[place] = drawn()
        value, found = tried(coefficients)
        n += 1
        if value < least:
            least, levels, best, failed = value, found, tuple(coefficients), 0
            history.append(least)
        elif local:
            failed += 1
            changed, failed = (changed - 1, 0) if failed == how.patience else (changed, failed)
    if not math.isfinite(least):
        raise NumericError(
            "no choice of levels leaves a model whose loss is finite; use float32 or bfloat16, or raise keep"
        )
    return Weighed(levels, least, best, history[0], tuple(history), n, len(known))


def _weighed(item: Item, coefficient: float) -> Item:
    return replace(item, errors=tuple(coefficient * error for error in item.errors))
