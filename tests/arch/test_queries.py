"""Query heads as units: only where they are asked for, at equal counts, and every layout holds what they leave."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from tests.arch.conftest import CONFIGS, GROUPED
from tests.arch.test_laws import Tiny, described, logits, random_masks, shrunk
from torch import Tensor

import compresso
from compresso.arch.base import arch_for
from compresso.arch.queries import axes_of
from compresso.core.axis import Kind
from compresso.core.budget import Budget, InfeasibleBudget
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, ExportError
from compresso.formats.hf import save_checkpoint
from compresso.native import family_of
from compresso.solve.allocate import allocate

PER_LAYER = [name for name in GROUPED if family_of(CONFIGS[name]().model_type)]


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_units_only_where_they_are_asked_for_and_share_key_value_heads(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    arch = arch_for(model.config)
    axes = axes_of(arch, model, (Kind.QUERY,))
    assert tuple(axis for axis in axes if axis.kind != Kind.QUERY) == arch.axes(model) == axes_of(arch, model, ())
    of_layer = {shape.kv_heads: shape.query_heads // shape.kv_heads for shape in arch.shapes(model)}
    queries = [axis for axis in axes if axis.kind == Kind.QUERY]
    assert len(queries) == (sum(shape.kv_heads for shape in arch.shapes(model)) if name in GROUPED else 0)
    assert {axis.size for axis in queries} == (set(of_layer.values()) if name in GROUPED else set())


def test_the_last_ones_but_one_leave_none_to_remove(tiny: Tiny) -> None:
    model = tiny("llama_gqa")
    arch, axes = described(model)
    shrink_(model, axes, Plan({axis.name: (1,) for axis in axes if axis.kind == Kind.QUERY}))
    assert {(shape.query_heads, shape.kv_heads) for shape in arch.shapes(model)} == {(2, 2)}
    assert not [axis for axis in described(model)[1] if axis.kind == Kind.QUERY]


def test_unequal_numbers_are_refused_and_nothing_is_changed(tiny: Tiny) -> None:
    model = tiny("llama_gqa")
    _, axes = described(model)
    before = logits(model)
    uneven = {"layers.1.heads.0.queries": (0, 1), "layers.1.heads.1.queries": (0, 1, 3)}
    with pytest.raises(ArchError, match=r"unequal numbers within the units of layers\.1\.heads \(2 in .*, 3 in .*\)"):
        shrink_(model, axes, Plan(uneven))
    with pytest.raises(ArchError, match=r"0 of 4 units; at least 1 must be kept"):
        shrink_(model, axes, Plan({f"layers.1.heads.{g}.queries": () for g in range(2)}))
    assert torch.equal(logits(model), before)
    shrink_(model, axes, Plan({**uneven, "layers.1.heads": (1,)}))
    assert [(shape.query_heads, shape.kv_heads) for shape in arch_for(model.config).shapes(model)][1] == (3, 1)


def test_the_same_entries_leave_as_by_hand(tiny: Tiny) -> None:
    model, before = tiny("llama_gqa"), tiny("llama_gqa").get_submodule("model.layers.2.self_attn")
    _, axes = described(model)
    shrink_(model, axes, Plan({"layers.2.heads.0.queries": (1, 3), "layers.2.heads.1.queries": (0, 1)}))
    after, heads = model.get_submodule("model.layers.2.self_attn"), [1, 3, 4, 5]
    rows = before.get_parameter("q_proj.weight").unflatten(0, (8, 8))[heads].flatten(0, 1)
    columns = before.get_parameter("o_proj.weight").unflatten(1, (8, 8))[:, heads].flatten(1)
    assert torch.equal(after.get_parameter("q_proj.weight"), rows)
    assert torch.equal(after.get_parameter("o_proj.weight"), columns)
    for name in ("k_proj.weight", "v_proj.weight"):
        assert torch.equal(after.get_parameter(name), before.get_parameter(name))


def equal_masks(name: str, tiny: Tiny) -> dict[str, Tensor]:
    """One query head of each key/value head in every layer, another one each time."""
    axes = [axis for axis in described(tiny(name))[1] if axis.kind == Kind.QUERY]
    return {axis.name: torch.eye(axis.size)[i % axis.size] for i, axis in enumerate(axes)}


@pytest.mark.parametrize("layout", ["native", "padded"])
@pytest.mark.parametrize("name", PER_LAYER)
def test_layers_of_their_own_ratio_are_reopened(
    tiny: Tiny, name: str, layout: Literal["native", "padded"], tmp_path: Path
) -> None:
    model = tiny(name)
    arch, axes = described(model)
    masks = {key: mask for key, mask in random_masks(axes, Kind.QUERY, soft=False).items() if key[:8] != "layers.1"}
    masks["layers.2.heads"] = torch.eye(arch.shapes(model)[2].kv_heads)[0]
    shrunk(model, axes, masks)
    ratios = [shape.query_heads // shape.kv_heads for shape in arch.shapes(model)]
    assert ratios[1] > max(ratios[::2])
    expected = logits(model)
    assert save_checkpoint(model, arch.shapes(model), tmp_path / "out", layout) == layout
    again = compresso.load(tmp_path / "out").model
    assert (logits(again.eval()) - expected).abs().max() < 1e-5
    if layout == "native":
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
        own = again.config.per_layer_config
        for i, shape in enumerate(arch.shapes(model)):
            assert (own[i].num_attention_heads, own[i].num_key_value_heads) == (shape.query_heads, shape.kv_heads)


@pytest.mark.parametrize("name", [name for name in GROUPED if not name.startswith("phi_")])
def test_a_stock_class_holds_equal_ratios(tiny: Tiny, name: str, tmp_path: Path) -> None:
    model = tiny(name)
    arch, axes = described(model)
    shrunk(model, axes, equal_masks(name, tiny))
    expected = logits(model)
    assert save_checkpoint(model, arch.shapes(model), tmp_path / "out") == "uniform"
    again = compresso.load(tmp_path / "out").model
    assert not again.config.model_type.startswith("compresso")
    assert (logits(again.eval()) - expected).abs().max() < 1e-5
    assert again.config.num_attention_heads == again.config.num_key_value_heads < model.config.hidden_size


def test_a_config_that_says_no_width_of_heads_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (name,) = [name for name in GROUPED if name.startswith("phi_")]
    model = tiny(name)
    arch, axes = described(model)
    shrunk(model, axes, equal_masks(name, tiny))
    with pytest.raises(ExportError, match="its config has no head_dim, so keep all heads"):
        save_checkpoint(model, arch.shapes(model), tmp_path / "out")


@pytest.mark.parametrize("name", GROUPED)
def test_a_budget_is_met_with_them_and_not_exceeded(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    arch, axes = described(model)
    kinds = (Kind.HEAD, Kind.QUERY, Kind.CHANNEL, Kind.EXPERT_CHANNEL)
    cost, generator = CostModel(axes, arch.weights(model)), torch.Generator().manual_seed(3)
    scores = {axis.name: torch.rand(axis.size, generator=generator) for axis in axes}
    budget = Budget(0.6, kinds=kinds)
    plan = allocate(axes, scores, cost, budget)
    predicted = int(cost.of(plan).blocks)
    shrink_(model, axes, plan)
    assert predicted == int(CostModel(arch.axes(model), arch.weights(model))().blocks) <= budget.limit(cost)
    largest = (3 * 64 + 3) * max(1, *(shape.experts for shape in arch.shapes(model)))  # a channel is one of all experts
    assert predicted > 0.6 * float(cost().blocks) - largest
    assert any(len(units) < len(scores[key]) for key, units in plan.kept.items() if key.endswith("queries"))


@pytest.mark.parametrize("name", GROUPED)
def test_a_budget_that_no_number_of_them_meets_is_refused(tiny: Tiny, name: str) -> None:
    """Those of heads that left are gone with them."""
    model = tiny(name)
    arch, axes = described(model)
    scores = {axis.name: torch.ones(axis.size) for axis in axes}
    with pytest.raises(InfeasibleBudget, match=r"keep=0\.1 allows .* in what the kinds head, query do not reach"):
        allocate(axes, scores, CostModel(axes, arch.weights(model)), Budget(0.1, kinds=(Kind.HEAD, Kind.QUERY)))
