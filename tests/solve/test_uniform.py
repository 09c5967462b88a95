"""Uniform targets are on the budget, allowed, and close to one share."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compresso.core.axis import Kind
from compresso.core.budget import TOLERANCE, Budget, InfeasibleBudget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.solve.uniform import uniform_targets

Describe = Callable[..., CostModel]
KINDS = (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN)


def count(cost: CostModel, targets: dict[Kind, int], budget: Budget) -> float:
    return float(
        cost.of(
            Plan({axis.name: tuple(range(targets[axis.kind])) for axis in cost.axes if axis.kind in targets})
        ).count(budget.of)
    )


@settings(deadline=None, max_examples=40)
@given(
    keep=st.floats(0.2, 1.0),
    kinds=st.sampled_from([KINDS, (Kind.CHANNEL, Kind.HIDDEN), (Kind.HEAD, Kind.CHANNEL), (Kind.HIDDEN,)]),
    multiple=st.sampled_from([1, 8, 32]),
    of=st.sampled_from(["blocks", "macs"]),
)
def test_targets_are_allowed_and_land_on_the_budget(
    describe: Describe, keep: float, kinds: tuple[Kind, ...], multiple: int, of: Any
) -> None:
    cost = describe(64, 3, 8, 200, 50)
    budget = Budget(keep, of=of, kinds=kinds, multiple_of={Kind.CHANNEL: multiple})
    limit = budget.limit(cost)
    try:
        targets = uniform_targets(cost.axes, cost, budget)
    except InfeasibleBudget:
        assert count(cost, {kind: int(kind == Kind.HIDDEN) for kind in kinds}, budget) > limit
        return
    assert set(targets) == set(kinds)
    sizes = {Kind.HEAD: 8, Kind.CHANNEL: 200, Kind.HIDDEN: 64}
    found = count(cost, targets, budget)
    assert found <= limit or budget.rounds
    for kind, n in targets.items():
        allowed = budget.allowed(kind, sizes[kind], int(kind == Kind.HIDDEN))
        assert n in allowed
    n_steps = {Kind.HEAD: 8, Kind.CHANNEL: 200 / multiple, Kind.HIDDEN: 64}
    finest = max(kinds, key=lambda kind: n_steps[kind])
    allowed = budget.allowed(finest, sizes[finest])
    at = allowed.index(targets[finest])
    for n in (
        allowed[max(at - 1, 0)],
        allowed[min(at + 1, len(allowed) - 1)],
    ):  # neither step of the finest kind comes nearer
        stepped = count(cost, {**targets, finest: n}, budget)
        assert abs(stepped - limit) >= abs(found - limit) or (stepped > limit and not budget.rounds)


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7, 0.5])
def test_all_kinds_keep_about_the_same_share(llama_7b: CostModel, keep: float) -> None:
    budget = Budget(keep, kinds=KINDS, multiple_of={Kind.CHANNEL: 64, Kind.HIDDEN: 64})
    targets = uniform_targets(llama_7b.axes, llama_7b, budget)
    shares = [targets[Kind.HEAD] / 32, targets[Kind.CHANNEL] / 11008, targets[Kind.HIDDEN] / 4096]
    assert max(shares) - min(shares) < 0.04
    assert abs(count(llama_7b, targets, budget) / budget.limit(llama_7b) - 1) < TOLERANCE


def test_keep_1_keeps_everything_and_floors_hold(describe: Describe) -> None:
    cost = describe(64, 3, 8, 200, 50)
    assert uniform_targets(cost.axes, cost, Budget(1, kinds=KINDS)) == {
        Kind.HEAD: 8,
        Kind.CHANNEL: 200,
        Kind.HIDDEN: 64,
    }
    held = uniform_targets(cost.axes, cost, Budget(0.4, floor={Kind.HEAD: 7}))
    assert held[Kind.HEAD] == 7
    with pytest.raises(InfeasibleBudget, match=r"may not go below 64 of 64 units"):
        uniform_targets(cost.axes, cost, Budget(0.4, kinds=(Kind.HIDDEN,), floor={Kind.HIDDEN: 100}))


def test_layers_count_as_one_more_kind(describe: Describe) -> None:
    cost = describe(64, 10, 8, 200, 50, depth=True)
    budget = Budget(0.5, kinds=(Kind.LAYER, Kind.CHANNEL))
    targets = uniform_targets(cost.axes, cost, budget)
    assert 0 <= budget.limit(cost) - count(cost, targets, budget) < 10 * 3 * 64
    assert 5 <= targets[Kind.LAYER] < 10
