"""Gates on layers, attentions and MLPs beside those of their units: a unit counts while all that it lies in is open."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.gates import Gates
from compresso.core.hard_concrete import LOG_ALPHA_HIGH, LOG_ALPHA_LOW, clamp_, keep_probability
from compresso.solve.allocate import allocate
from compresso.solve.constraint import ShareOfModel
from compresso.solve.depth import absorbed
from compresso.solve.project import reachable, shift_to_budget

Describe = Callable[..., CostModel]
MIXED = (Kind.HEAD, Kind.CHANNEL, Kind.LAYER)
NESTED = (*MIXED, Kind.ATTENTION, Kind.MLP)
kinds_mixed = pytest.mark.parametrize("kinds", [MIXED, NESTED, (*NESTED, Kind.HIDDEN)])


def axes_of(cost: CostModel, kinds: tuple[Kind, ...]) -> list[Axis]:
    return [axis for axis in cost.axes if axis.kind in kinds]


def drawn(cost: CostModel, kinds: tuple[Kind, ...], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        axis.name: torch.randn(axis.size, generator=generator, dtype=torch.float64) * 2 + 1
        for axis in axes_of(cost, kinds)
    }


@pytest.mark.parametrize("of", ["blocks", "macs"])
def test_the_expected_cost_is_the_mean_over_all_sets_of_open_gates(describe: Describe, of: Any) -> None:
    """Brute force: every set of open gates of a model with two layers, weighed by its probability."""
    cost = describe(4, 2, 1, 2, 5, depth=True)
    gates = drawn(cost, NESTED, seed=3)
    probabilities = {name: keep_probability(gate) for name, gate in gates.items()}
    each = torch.cat(list(probabilities.values()))
    sizes = [len(gate) for gate in gates.values()]
    assert len(each) == 12
    total = 0.0
    for bits in itertools.product((0.0, 1.0), repeat=len(each)):
        open_ = torch.tensor(bits, dtype=torch.float64)
        weight = float(torch.where(open_ > 0, each, 1 - each).prod())
        masks = dict(zip(gates, open_.split(sizes), strict=True))
        total += weight * float(cost(masks).count(of))
    assert float(cost(probabilities).count(of)) == pytest.approx(total, rel=1e-12)
    gap = ShareOfModel(cost, 0.7, of).gaps(probabilities, 1.0)[0]
    assert float(gap) == pytest.approx(1 - total / float(cost().count(of)) - 0.3, abs=1e-12)


def test_an_open_unit_in_a_closed_block_costs_nothing(describe: Describe) -> None:
    cost = describe(8, 3, 2, 4, 10, depth=True)
    one = torch.tensor([1.0, 0.0, 1.0])
    closed = cost({"layers": one})
    for inside in (torch.zeros, torch.ones):
        masks = {"layers": one, "layers.1.heads": inside(2), "layers.1.channels": inside(4)}
        assert cost(masks).blocks == closed.blocks
    both = {"layers": one, "attention": one, "mlp": one}
    assert cost(both).blocks == closed.blocks  # counted once, however many gates close it
    open_ = {
        name: torch.ones(size, requires_grad=True) for name, size in (("layers.1.heads", 2), ("layers.0.heads", 2))
    }
    cost({"layers": one, **open_}).blocks.backward()
    inside, outside = (open_[name].grad for name in open_)
    assert inside is not None and outside is not None
    assert inside.abs().max() == 0 and outside.min() > 0  # and its gate is charged nothing


@settings(deadline=None, max_examples=25)
@given(keep=st.floats(0.05, 0.95), seed=st.integers(0, 1000), kinds=st.sampled_from([MIXED, NESTED]))
def test_one_shift_of_mixed_gates_ends_on_the_budget(
    describe: Describe, keep: float, seed: int, kinds: tuple[Kind, ...]
) -> None:
    cost = describe(16, 3, 4, 8, 10, depth=True)
    gates = drawn(cost, kinds, seed)
    least, most = reachable(gates, cost)
    keep = min(max(keep, least), most)
    shift = shift_to_budget(gates, cost, keep)
    landed = {
        name: keep_probability((gate + shift).clamp(LOG_ALPHA_LOW, LOG_ALPHA_HIGH)) for name, gate in gates.items()
    }
    assert float(cost(landed).blocks / cost().blocks) == pytest.approx(keep, rel=1e-8)


@kinds_mixed
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.85])
def test_a_budget_of_mixed_kinds_is_met_and_nothing_more_fits(
    describe: Describe, keep: float, kinds: tuple[Kind, ...]
) -> None:
    cost = describe(64, 6, 4, 96, 10, depth=True)
    axes, gates = axes_of(cost, kinds), drawn(cost, kinds, seed=1)
    budget = Budget(keep, kinds=kinds)
    dense = float(cost().blocks)
    hard = {name: mask.double() for name, mask in allocate(axes, gates, cost, budget).masks(axes).items()}
    kept = float(cost(hard).blocks)
    assert keep * dense * (1 - 0.005) <= kept <= keep * dense
    for name, mask in hard.items():
        for unit in (mask == 0).nonzero().flatten().tolist():
            again = {**hard, name: mask.clone().index_fill_(0, torch.tensor(unit), 1.0)}
            added = float(cost(again).blocks) - kept
            assert added == 0 or kept + added > keep * dense


def test_a_gate_s_projection_moves_layers_with_their_units(describe: Describe) -> None:
    """One shift for all kinds: the order of gates stays, and the expected count is on its target after a step away."""
    cost = describe(16, 3, 4, 8, 10, depth=True)
    axes = axes_of(cost, NESTED)
    gates = Gates(axes, {name: gate.float() for name, gate in drawn(cost, NESTED, 2).items()})
    constraint = ShareOfModel(cost, 0.6)
    gates.shift_(constraint.project(gates, 1.0))
    assert constraint.sparsity(gates.keep_probabilities()).item() == pytest.approx(0.4, abs=1e-6)
    with torch.no_grad():
        clamp_(gates.log_alpha.add_(0.3 * torch.randn(len(gates), generator=torch.Generator().manual_seed(1))))
    gates.shift_(constraint.project(gates, 1.0))
    assert constraint.sparsity(gates.keep_probabilities()).item() == pytest.approx(0.4, abs=1e-6)


def test_a_layer_of_which_nothing_is_left_leaves(describe: Describe) -> None:
    """Closed sub-layers, and sub-layers without a unit, alike; one that has a sub-layer left stays."""
    cost = describe(8, 4, 2, 4, 10, depth=True)
    axes = axes_of(cost, NESTED)
    masks = {axis.name: torch.ones(axis.size) for axis in axes}
    masks["attention"][[0, 1]] = 0
    masks["mlp"][0] = 0
    masks["layers.1.channels"][:] = 0
    masks["layers.2.channels"][:] = 0
    found = absorbed(axes, masks)
    assert found["layers"].tolist() == [0, 0, 1, 1]
    assert all(torch.equal(found[name], masks[name]) for name in masks if name != "layers")
    assert cost(found).blocks == cost(masks).blocks
    named = {name: mask for name, mask in masks.items() if name != "layers"}
    assert absorbed(axes, named) == named  # layers are not the budget's to take
    units = [axis for axis in axes if axis.kind in MIXED]
    of_units = {axis.name: masks[axis.name] for axis in units}
    assert absorbed(units, of_units)["layers"].tolist() == [1, 1, 1, 1]  # attentions without gates are whole
    nothing = {name: torch.zeros_like(mask) if name != "layers" else mask for name, mask in masks.items()}
    assert absorbed(axes, nothing)["layers"].tolist() == [1, 1, 1, 1]  # a model keeps a layer
