"""Budgets in milliseconds: every way to allocate meets a table of costs as it meets a formula."""

import itertools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from tests.core.test_lookup_cost import MODEL, milliseconds, table_of
from torch import Tensor

from compresso.core.axis import Kind
from compresso.core.budget import Budget, InfeasibleBudget
from compresso.core.cost import CostModel
from compresso.core.hard_concrete import LOG_ALPHA_HIGH, LOG_ALPHA_LOW, keep_probability
from compresso.core.lookup_cost import LookupCost
from compresso.core.plan import Plan
from compresso.solve.allocate import allocate
from compresso.solve.allocation import Allocation, allocated
from compresso.solve.constraint import ShareOfModel
from compresso.solve.depth import drop_run
from compresso.solve.exact import allocate_exactly
from compresso.solve.levels import choose_levels
from compresso.solve.project import deterministic_to_budget, shift_to_budget
from compresso.solve.removal import lowest_within
from compresso.solve.shapes import candidate_shapes
from compresso.solve.uniform import uniform_targets

KINDS = (Kind.HEAD, Kind.CHANNEL)


@pytest.fixture
def measured(tiny: CostModel) -> LookupCost:
    return LookupCost(tiny.axes, table_of(tiny), MODEL, tiny)


def scores_of(cost: LookupCost, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.size, generator=generator) for axis in cost.axes if axis.kind in KINDS}


def spent(cost: LookupCost, plan: Plan) -> float:
    return float(cost.of(plan).count("milliseconds"))


@pytest.mark.parametrize("how", get_args(Allocation))
@pytest.mark.parametrize("keep", [0.35, 0.6, 0.85])
def test_a_budget_of_milliseconds_is_met_and_used_up(measured: LookupCost, how: Allocation, keep: float) -> None:
    budget = Budget(keep, of="milliseconds")
    plan = allocated(how, measured.axes, scores_of(measured), measured, budget)
    limit = budget.limit(measured)
    assert limit == pytest.approx(keep * milliseconds(measured))
    assert limit * 0.93 < spent(measured, plan) <= limit  # an empty attention's first head is the dearest step


def test_with_a_linear_table_plans_are_those_of_the_formula(tiny: CostModel) -> None:
    """Milliseconds in proportion to parameters: the same units leave."""
    modules = {}
    for axis in tiny.axes:
        if axis.kind in KINDS:
            dense, none = tiny(), tiny({axis.name: torch.zeros(axis.size)})
            price = float(dense.blocks - none.blocks) / axis.size
            modules[axis.name] = {0: 0.0, axis.size: price * axis.size}
    inside = sum(max(costs.values()) for costs in modules.values())
    table = table_of(tiny, modules=modules, fixed=float(tiny().blocks) - inside)
    measured = LookupCost(tiny.axes, table, MODEL)
    for keep in (0.5, 0.71):
        scores = scores_of(measured, seed=3)
        by_table = allocate(tiny.axes, scores, measured, Budget(keep, of="milliseconds"))
        assert by_table == allocate(tiny.axes, scores, tiny, Budget(keep))


@pytest.mark.parametrize("keep", [0.4, 0.55, 0.8])
def test_exact_is_the_best_of_all_counts(describe: Callable[..., CostModel], keep: float) -> None:
    counted = describe(16, 2, 3, 8, 32)
    cost = LookupCost(counted.axes, table_of(counted), MODEL)
    scores, budget = scores_of(cost, seed=5), Budget(keep, of="milliseconds")
    plan = allocate_exactly(cost.axes, scores, cost, budget)
    assert spent(cost, plan) <= budget.limit(cost)
    pool = [axis for axis in cost.axes if axis.kind in KINDS]
    best = max(
        sum(
            float(scores[a.name].double().sort(descending=True).values[:n].sum())
            for a, n in zip(pool, counts, strict=True)
        )
        for counts in itertools.product(*(range(axis.size + 1) for axis in pool))
        if spent(cost, Plan({a.name: tuple(range(n)) for a, n in zip(pool, counts, strict=True)})) <= budget.limit(cost)
    )
    worth = sum(float(scores[a.name].double()[list(plan.kept[a.name])].sum()) for a in pool)
    assert worth >= best * (1 - 1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_levels_are_those_of_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    worths = {f"m{i}": torch.rand(4, generator=generator).tolist() for i in range(5)}
    costs = {f"m{i}": torch.rand(4, generator=generator).tolist() for i in range(5)}
    limit = sum(min(one) for one in costs.values()) + 0.9

    def total(of: dict[str, list[float]], levels: Any) -> float:
        return sum(of[f"m{i}"][level] for i, level in enumerate(levels))

    levels = choose_levels(worths, costs, limit)
    mine = [levels[f"m{i}"] for i in range(5)]
    fitting = [levels for levels in itertools.product(range(4), repeat=5) if total(costs, levels) <= limit]
    assert total(costs, mine) <= limit
    assert total(worths, mine) >= max(total(worths, levels) for levels in fitting) - 1e-3
    cheapest = choose_levels(worths, costs, sum(min(one) for one in costs.values()))
    assert all(costs[name][level] == min(costs[name]) for name, level in cheapest.items())
    with pytest.raises(InfeasibleBudget, match="the cheapest levels cost"):
        choose_levels(worths, costs, 0.0)
    with pytest.raises(ValueError, match="m0 has 4 worths and 3 costs"):
        choose_levels(worths, {**costs, "m0": costs["m0"][:3]}, limit)


def test_one_width_for_all_layers_meets_milliseconds(measured: LookupCost) -> None:
    budget = Budget(0.6, of="milliseconds", uniform_over=KINDS)
    limit = budget.limit(measured)
    for counts in [
        uniform_targets(measured.axes, measured, budget),
        *candidate_shapes(measured.axes, measured, budget, 3),
    ]:
        plan = Plan({a.name: tuple(range(counts[a.kind])) for a in measured.axes if a.kind in counts})
        assert 0.9 * limit < spent(measured, plan) <= limit
    plan = allocate(measured.axes, scores_of(measured), measured, budget)
    assert len({len(plan.kept[a.name]) for a in measured.axes if a.kind == Kind.CHANNEL}) == 1
    assert spent(measured, plan) <= limit


def test_learned_gates_are_held_to_milliseconds(measured: LookupCost) -> None:
    generator = torch.Generator().manual_seed(1)
    gates = {a.name: torch.randn(a.size, generator=generator) for a in measured.axes if a.kind in KINDS}
    shift = shift_to_budget(gates, measured, 0.5, "milliseconds")
    open_ = {
        name: keep_probability((gate.double() + shift).clamp(LOG_ALPHA_LOW, LOG_ALPHA_HIGH))
        for name, gate in gates.items()
    }
    dense = milliseconds(measured)
    assert milliseconds(measured, open_) == pytest.approx(dense / 2, rel=1e-8)
    assert float(ShareOfModel(measured, 0.5, "milliseconds").sparsity(open_)) == pytest.approx(0.5, rel=1e-8)
    masks = deterministic_to_budget(gates, measured.axes, measured, 0.5, "milliseconds")
    kept = Plan.from_masks([axis for axis in measured.axes if axis.name in masks], masks)
    assert 0.9 * dense / 2 < spent(measured, kept) <= dense / 2


def test_rounds_and_runs_of_layers_count_milliseconds(describe: Callable[..., CostModel], measured: LookupCost) -> None:
    plan = lowest_within(
        [a for a in measured.axes if a.kind in KINDS], scores_of(measured), measured, "milliseconds", 1.0
    )
    assert 0 < milliseconds(measured) - spent(measured, plan) <= 1.0
    counted = describe(16, 4, 4, 12, 32, depth=True)
    deep = LookupCost(counted.axes, table_of(counted), MODEL)
    layers = next(axis for axis in deep.axes if axis.name == "layers")
    kept = drop_run(layers, torch.rand(5, 5), deep, Budget(0.5, of="milliseconds", kinds=(Kind.LAYER,)))
    assert spent(deep, kept) <= 0.5 * milliseconds(deep)


def test_what_cannot_be_met_is_refused_in_milliseconds(measured: LookupCost) -> None:
    for allocation in (allocate, allocate_exactly):
        with pytest.raises(
            InfeasibleBudget, match=r"keep=0\.01 allows 0\.\d+ of [\d.]+ milliseconds, but at least 1\.25 are kept"
        ):
            allocation(measured.axes, scores_of(measured), measured, Budget(0.01, of="milliseconds"))
