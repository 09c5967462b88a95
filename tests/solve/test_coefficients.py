"""Searched coefficients: what they choose is within the budget, never worse than plain errors, and asked for once."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from pydantic import ValidationError

from compresso.core.budget import InfeasibleBudget
from compresso.errors import NumericError
from compresso.solve.coefficients import CoefficientSearch, search_coefficients
from compresso.solve.level_choice import Item, Levels, choose_exactly, fits

ITEMS = [Item(f"i{n}", (0.0, -1.0, -2.0, -3.0), (0.0, 0.2 + 0.01 * n, 0.5, 1.0)) for n in range(6)]
"""Parts that look alike from their own errors."""
LIMIT = -9.0
TRUE = (5.0, 0.1, 3.0, 0.2, 8.0, 0.1)
"""How much each of them counts."""


def choose(items: Sequence[Item]) -> Levels:
    return choose_exactly(items, LIMIT).levels


class Model:
    """A made-up fitness that notes what it is asked for."""

    def __init__(self, weights: Sequence[float] = TRUE) -> None:
        self.weights, self.asked = weights, list[Levels]()

    def __call__(self, levels: Levels, stage: int, /) -> float:
        self.asked.append(levels)
        return sum(w * item.errors[n] for w, item, n in zip(self.weights, ITEMS, levels, strict=True))


def test_the_search_finds_what_no_choice_within_the_budget_beats() -> None:
    model = Model()
    every = [levels for levels in itertools.product(range(4), repeat=6) if fits(ITEMS, levels, LIMIT)]
    least = min(Model()(levels, 0) for levels in every)
    found = search_coefficients(ITEMS, choose, model, CoefficientSearch(evaluations=400, draws=60), seed=0)
    assert found.fitness == pytest.approx(least) and found.first > 2 * least
    weighed = [
        replace(item, errors=tuple(c * error for error in item.errors))
        for item, c in zip(ITEMS, found.coefficients, strict=True)
    ]
    assert choose(weighed) == found.levels


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("evaluations", [1, 2, 30, 120])
def test_all_that_is_tried_is_within_the_budget_and_asked_for_once(seed: int, evaluations: int) -> None:
    how, model = CoefficientSearch(evaluations=evaluations, draws=20, patience=10), Model()
    found = search_coefficients(ITEMS, choose, model, how, seed=seed)
    assert all(fits(ITEMS, levels, LIMIT) for levels in model.asked)
    assert len(model.asked) == len(set(model.asked)) == found.tried <= found.evaluations <= evaluations
    assert model.asked[0] == choose(ITEMS) and found.first == found.history[0]
    assert list(found.history) == sorted(set(found.history), reverse=True) and found.history[-1] == found.fitness
    assert found == search_coefficients(ITEMS, choose, Model(), how, seed=seed)


@pytest.mark.parametrize(("mutated", "steps"), [(0.1, 7), (0.5, 21)])
def test_a_search_that_finds_nothing_ends(mutated: float, steps: int) -> None:
    """Three coefficients, two, then one, seven failures each."""
    how = CoefficientSearch(evaluations=10_000, draws=5, mutated=mutated, patience=7)
    assert search_coefficients(ITEMS, choose, Model([0.0] * 6), how, seed=0).evaluations == 1 + 5 + steps


def test_a_step_changes_few_coefficients_of_the_best() -> None:
    """With one coefficient a step, neighbours in the search differ from the best so far in one place."""
    seen: list[tuple[float, ...]] = []

    def noting(items: Sequence[Item]) -> Levels:
        seen.append(tuple(item.errors[-1] for item in items))  # the coefficient, as the last error is 1
        return choose(items)

    how = CoefficientSearch(evaluations=60, draws=3, mutated=0.1)
    search_coefficients(ITEMS, noting, Model([0.0] * 6), how, seed=0)
    assert seen[0] == (1.0,) * 6 and all(0 < c <= 1 for vector in seen for c in vector)
    assert all(sum(a != b for a, b in zip(seen[0], vector, strict=True)) == 6 for vector in seen[1:4])
    assert all(sum(a != b for a, b in zip(seen[0], vector, strict=True)) == 1 for vector in seen[4:])


def test_what_is_no_number_is_worst() -> None:
    plain = choose(ITEMS)
    how = CoefficientSearch(evaluations=40, draws=20)
    found = search_coefficients(ITEMS, choose, lambda levels, _: math.nan if levels == plain else 1.0, how, seed=0)
    assert found.levels != plain and found.first == math.inf and found.fitness == 1
    with pytest.raises(NumericError, match="no choice of levels leaves a model whose loss is finite"):
        search_coefficients(ITEMS, choose, lambda *_: math.nan, how, seed=0)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValidationError, match="evaluations=0; wanted at least 1"):
        CoefficientSearch(evaluations=0)
    with pytest.raises(ValidationError, match=r"mutated=0\.0 is no share"):
        CoefficientSearch(mutated=0)
    with pytest.raises(InfeasibleBudget, match="the cheapest levels cost"):
        search_coefficients(
            ITEMS, lambda items: choose_exactly(items, -100).levels, Model(), CoefficientSearch(), seed=0
        )
