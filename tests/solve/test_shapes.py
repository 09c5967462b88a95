"""Shapes of one size: all on the budget, all different, the even one first."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.axis import Axis, Kind
from compresso.core.budget import TOLERANCE, Budget, InfeasibleBudget
from compresso.core.cost import CostModel
from compresso.solve.shapes import BELOW, GRID, candidate_shapes
from compresso.solve.uniform import uniform_targets


@pytest.fixture(scope="module")
def model() -> tuple[tuple[Axis, ...], CostModel]:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=96,
    )
    with torch.device("meta"):
        built = LlamaForCausalLM(config)
    arch = arch_for(config)
    return arch.axes(built), CostModel(arch.axes(built), arch.weights(built))


def counted(axes: tuple[Axis, ...], cost: CostModel, counts: dict[Kind, int]) -> float:
    masks = {
        axis.name: torch.full((axis.size,), counts[axis.kind] / axis.size).double()
        for axis in axes
        if axis.kind in counts
    }
    return float(cost(masks).count("blocks"))


@pytest.mark.parametrize("kinds", [("channel", "hidden"), ("layer", "channel"), ("head", "channel", "hidden", "layer")])
@pytest.mark.parametrize("multiples", [{}, {"hidden": 8, "channel": 8}])
def test_all_are_different_and_on_the_budget(
    model: tuple[tuple[Axis, ...], CostModel], kinds: tuple[Kind, ...], multiples: dict[Kind, int]
) -> None:
    axes, cost = model
    budget = Budget(0.7, kinds=kinds, uniform_over=kinds, multiple_of=multiples)
    found = candidate_shapes(axes, cost, budget, 12)
    assert found[0] == uniform_targets(axes, cost, budget)
    assert 2 <= len(found) <= 12
    assert len({tuple(sorted(counts.items())) for counts in found}) == len(found)
    for i, counts in enumerate(found):
        kept = counted(axes, cost, counts) / budget.limit(cost)
        above = 0.0 if not budget.rounds else 0.05 if i == 0 else TOLERANCE  # the even shape takes the nearest multiple
        assert 1 - BELOW - 1e-6 <= kept <= 1 + above + 1e-6
        for kind, n in counts.items():
            size = next(axis.size for axis in axes if axis.kind == kind)
            assert n in budget.allowed(kind, size)


def test_the_number_asked_for_takes_those_nearest_to_the_even_shape(model: tuple[tuple[Axis, ...], CostModel]) -> None:
    axes, cost = model
    budget = Budget(0.7, kinds=(Kind.CHANNEL, Kind.HIDDEN))
    everything = candidate_shapes(axes, cost, budget, 1000)
    assert len(everything) <= 1 + 2 * GRID
    for n in (1, 3):
        assert candidate_shapes(axes, cost, budget, n) == everything[:n]
    drift = [abs(counts[Kind.HIDDEN] - everything[0][Kind.HIDDEN]) for counts in everything]
    assert drift == sorted(drift) and max(drift) > 8


def test_what_cannot_be_met_is_refused(model: tuple[tuple[Axis, ...], CostModel]) -> None:
    axes, cost = model
    with pytest.raises(InfeasibleBudget, match=r"Raise keep"):
        candidate_shapes(axes, cost, Budget(0.2, kinds=(Kind.CHANNEL,), floor={Kind.CHANNEL: 100}), 3)
    with pytest.raises(ValueError, match="0 candidates"):
        candidate_shapes(axes, cost, Budget(0.7), 0)
