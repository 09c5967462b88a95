"""The exact allocation against brute force over all counts, and against the greedy one; budgets of the cache."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresso.core.axis import Axis, Kind, Slice
from compresso.core.budget import Budget, InfeasibleBudget
from compresso.core.cost import CostModel, Group, Weight
from compresso.core.plan import Plan
from compresso.solve.allocate import allocate
from compresso.solve.allocation import allocated
from compresso.solve.exact import allocate_exactly


def _small() -> CostModel:
    """Three axes whose units cost 7, 3 and 5 block parameters; the first holds cached rows."""
    weights, axes = [], []
    for i, (size, price, kind) in enumerate([(3, 7, Kind.HEAD), (5, 3, Kind.CHANNEL), (4, 5, Kind.CHANNEL)]):
        weights.append(Weight(f"w{i}", (size, price), Group.BLOCKS, macs=1, cached=size if kind == Kind.HEAD else 0))
        axes.append(Axis(f"a{i}", kind, size, (Slice(f"w{i}", 0),), (), "", layer=i))
    return CostModel(axes, weights)


def _worth(scores: dict[str, torch.Tensor], plan: Plan) -> float:
    return sum(float(scores[name][list(kept)].sum()) for name, kept in plan.kept.items())


@settings(max_examples=25, deadline=None)
@given(keep=st.floats(0.05, 1), seed=st.integers(0, 50), multiple=st.sampled_from([1, 2, 3]))
def test_nothing_is_worth_more_than_the_exact_plan(keep: float, seed: int, multiple: int) -> None:
    cost = _small()
    generator = torch.Generator().manual_seed(seed)
    scores = {axis.name: torch.rand(axis.size, generator=generator) for axis in cost.axes}
    budget = Budget(keep, multiple_of={Kind.CHANNEL: multiple})
    plan = allocate_exactly(cost.axes, scores, cost, budget)
    assert float(cost.of(plan).blocks) <= budget.limit(cost)
    best = 0.0
    for counts in itertools.product(*(budget.allowed(axis.kind, axis.size) for axis in cost.axes)):
        masks = {axis.name: (torch.arange(axis.size) < n).double() for axis, n in zip(cost.axes, counts, strict=True)}
        if float(cost(masks).blocks) <= budget.limit(cost):
            ranked = [
                scores[axis.name].sort(descending=True).values[:n].sum()
                for axis, n in zip(cost.axes, counts, strict=True)
            ]
            best = max(best, float(sum(ranked)))
    assert _worth(scores, plan) == pytest.approx(best, rel=2e-4, abs=1e-6)
    for axis in cost.axes:
        assert len(plan.kept[axis.name]) in budget.allowed(axis.kind, axis.size)


@pytest.mark.parametrize("of", ["blocks", "macs", "total"])
def test_it_is_no_worse_than_greedy_on_a_model(tiny: CostModel, of: str) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = {axis.name: torch.rand(axis.size, generator=generator) for axis in tiny.axes}
    budget = Budget(0.5, of)  # type: ignore[arg-type]
    exact = allocate_exactly(tiny.axes, scores, tiny, budget)
    greedy = allocate(tiny.axes, scores, tiny, budget)
    assert float(tiny.of(exact).count(budget.of)) <= budget.limit(tiny)
    assert _worth(scores, exact) >= _worth(scores, greedy) * (1 - 2e-4)


def test_a_cache_budget_takes_heads_and_leaves_channels() -> None:
    cost = _small()
    scores = {axis.name: torch.arange(1.0, axis.size + 1) for axis in cost.axes}
    for how in ("global", "exact"):
        kept = allocated(how, cost.axes, scores, cost, Budget(0.67, "kv")).kept  # type: ignore[arg-type]
        assert {name: len(units) for name, units in kept.items()} == {"a0": 2, "a1": 5, "a2": 4}
    with pytest.raises(InfeasibleBudget, match="in what the kinds channel do not reach"):
        allocate(cost.axes, scores, cost, Budget(0.5, "kv", kinds=("channel",)))  # type: ignore[arg-type]


def test_what_is_not_additive_is_refused(tiny: CostModel) -> None:
    scores = {axis.name: torch.ones(axis.size) for axis in tiny.axes}
    with pytest.raises(ValueError, match="kind 'hidden' depends on the others"):
        allocate_exactly(tiny.axes, scores, tiny, Budget(0.5, kinds=("head", "hidden")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout 'uniform'"):
        allocate_exactly(tiny.axes, scores, tiny, Budget(0.5, uniform_over=("head", "channel")))  # type: ignore[arg-type]
    with pytest.raises(InfeasibleBudget, match="may not go below 2 of 2 units"):
        allocate_exactly(tiny.axes, scores, tiny, Budget(0.1, floor={Kind.HEAD: 2}))
