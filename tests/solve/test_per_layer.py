"""Shares by layer: equal ones are equal within a unit, sensitive layers keep more, and the budget holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresso.core.axis import Kind
from compresso.core.budget import Budget, InfeasibleBudget
from compresso.core.cost import CostModel
from compresso.solve.per_layer import BOUNDS, allocate_per_layer, equal_weights, sensitivity_weights


def _scores(cost: CostModel, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.size, generator=generator) for axis in cost.axes}


@settings(max_examples=30, deadline=None)
@given(keep=st.floats(0.15, 1), seed=st.integers(0, 9), of=st.sampled_from(["blocks", "macs", "total"]))
def test_equal_shares_meet_the_budget_and_differ_by_a_unit_at_most(
    tiny: CostModel, keep: float, seed: int, of: str
) -> None:
    budget = Budget(keep, of, floor={Kind.HEAD: 1})  # type: ignore[arg-type]
    scores = _scores(tiny, seed)
    try:
        plan = allocate_per_layer(tiny.axes, scores, tiny, budget, equal_weights(tiny.axes, budget))
    except InfeasibleBudget:
        return
    assert float(tiny.of(plan).count(budget.of)) <= budget.limit(tiny)
    for kind in (Kind.HEAD, Kind.CHANNEL):
        counts = [len(plan.kept[axis.name]) for axis in tiny.axes if axis.kind == kind]
        assert max(counts) - min(counts) <= 1
    for axis in tiny.axes:
        if axis.name in plan.kept:
            kept = torch.zeros(axis.size, dtype=torch.bool)
            kept[list(plan.kept[axis.name])] = True
            if kept.any() and not kept.all():
                assert scores[axis.name][kept].min() >= scores[axis.name][~kept].max()


def test_a_sensitive_layer_keeps_more_within_bounds(tiny: CostModel) -> None:
    scores = {axis.name: torch.ones(axis.size) * (1.0 if axis.layer == 0 else 1.5) for axis in tiny.axes}
    budget = Budget(0.75, kinds=("channel",))  # type: ignore[arg-type]
    weights = sensitivity_weights(tiny.axes, scores, budget)
    assert weights == {
        "layers.0.channels": pytest.approx((1 / 1.25) ** 0.5),
        "layers.1.channels": pytest.approx((1.5 / 1.25) ** 0.5),
    }
    kept = allocate_per_layer(tiny.axes, scores, tiny, budget, weights).kept
    assert len(kept["layers.1.channels"]) > len(kept["layers.0.channels"])
    loud = {name: score * (1e6 if "1." in name else 1) for name, score in scores.items()}
    assert list(sensitivity_weights(tiny.axes, loud, budget).values()) == [BOUNDS[0], pytest.approx(2**0.5)]
    with pytest.raises(ValueError, match="below zero"):
        sensitivity_weights(tiny.axes, {name: score - 2 for name, score in scores.items()}, budget)


def test_multiples_hold_and_keeping_all_keeps_all(tiny: CostModel) -> None:
    scores = _scores(tiny, 0)
    budget = Budget(0.6, multiple_of={Kind.CHANNEL: 8})
    kept = allocate_per_layer(tiny.axes, scores, tiny, budget, equal_weights(tiny.axes, budget)).kept
    assert all(len(kept[axis.name]) % 8 == 0 for axis in tiny.axes if axis.kind == Kind.CHANNEL)
    whole = Budget(1.0)
    assert allocate_per_layer(tiny.axes, scores, tiny, whole, equal_weights(tiny.axes, whole)).is_noop(tiny.axes)


def test_an_impossible_floor_is_named(tiny: CostModel) -> None:
    budget = Budget(0.2, floor={Kind.CHANNEL: 20})
    with pytest.raises(InfeasibleBudget, match="may not go below 20 of 24 units"):
        allocate_per_layer(tiny.axes, _scores(tiny, 0), tiny, budget, equal_weights(tiny.axes, budget))
