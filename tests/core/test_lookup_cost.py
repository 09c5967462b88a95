"""Looked-up costs: what a table says is what is counted, whatever stays, and a table of another model is refused."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from compresso.core.axis import Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.cost_table import CostTable, monotone
from compresso.core.lookup_cost import LookupCost
from compresso.core.plan import Plan

MODEL = {"hidden_size": 64, "device": "cpu", "batch": 8}


def table_of(cost: CostModel, **fields: Any) -> CostTable:
    """Staircases of uneven steps: heads at every count, channels at every fourth, other in each layer."""
    modules = {}
    for axis in cost.axes:
        if axis.kind == Kind.HEAD:
            modules[axis.name] = {n: 0.31 * n + 0.5 * (n > 0) for n in range(axis.size + 1)}
        elif axis.kind == Kind.CHANNEL:
            counts = sorted({*range(0, axis.size, 4), axis.size})
            modules[axis.name] = {n: 0.05 * n + 0.2 * (n > 8) + 0.01 * (axis.layer or 0) * n for n in counts}
    return CostTable(**{"model": MODEL, "modules": modules, "fixed": 1.25, **fields})


def milliseconds(cost: LookupCost, masks: dict[str, Tensor] | None = None) -> float:
    return float(cost(masks).count("milliseconds"))


def test_every_number_of_units_costs_what_the_table_says(tiny: CostModel) -> None:
    table = table_of(tiny)
    cost = LookupCost(tiny.axes, table, MODEL)
    dense = table.fixed + sum(costs[max(costs)] for costs in table.modules.values())
    assert milliseconds(cost) == pytest.approx(dense, rel=1e-12)
    for axis in tiny.axes:
        for n, there in table.modules.get(axis.name, {}).items():
            mask = (torch.arange(axis.size) < n).float()
            expected = dense - table.modules[axis.name][axis.size] + there
            assert milliseconds(cost, {axis.name: mask}) == pytest.approx(expected, rel=1e-12)
            by_totals = cost.of_totals([axis.name], torch.tensor([float(n)]))
            assert float(by_totals.count("milliseconds")) == pytest.approx(expected, rel=1e-12)
            kept = Plan({axis.name: tuple(range(n))})
            assert float(cost.of(kept).count("milliseconds")) == pytest.approx(expected, rel=1e-12)


def test_between_counts_it_is_interpolated_with_gradients(tiny: CostModel) -> None:
    cost = LookupCost(tiny.axes, table_of(tiny), MODEL)
    axis = next(axis for axis in tiny.axes if axis.kind == Kind.CHANNEL)
    ends = [milliseconds(cost, {axis.name: (torch.arange(axis.size) < n).double()}) for n in (4, 8)]
    mask = torch.full((axis.size,), 5 / axis.size, dtype=torch.float64, requires_grad=True)
    amount = cost({axis.name: mask}).count("milliseconds")
    assert float(amount.detach()) == pytest.approx(ends[0] + (ends[1] - ends[0]) / 4, rel=1e-9)
    (gradient,) = torch.autograd.grad(amount, mask)
    torch.testing.assert_close(gradient, torch.full_like(gradient, (ends[1] - ends[0]) / 4))


def test_a_module_costs_nothing_once_its_layer_has_left(describe: Any) -> None:
    counted = describe(16, 3, 4, 12, 32, depth=True)
    table = table_of(counted)
    cost = LookupCost(counted.axes, table, MODEL)
    dense = milliseconds(cost)

    def of(layer: int, *kinds: str) -> float:
        return sum(max(table.modules[f"layers.{layer}.{kind}"].values()) for kind in kinds)

    def dropped(**units: int) -> float:
        masks = {name: (torch.arange(3) != unit).float() for name, unit in units.items()}
        return dense - milliseconds(cost, masks)

    assert dropped(attention=1) == pytest.approx(of(1, "heads"))
    assert dropped(mlp=2) == pytest.approx(of(2, "channels"))
    assert dropped(layers=0) == pytest.approx(of(0, "heads", "channels"))
    assert dropped(layers=0, attention=0, mlp=1) == pytest.approx(of(0, "heads", "channels") + of(1, "channels"))
    assert not cost.tiled(["layers"]) and cost.tiled(["layers.0.heads"])
    with pytest.raises(ValueError, match="layers costs from totals alone"):
        cost.of_totals(["layers"], torch.ones(1))


def test_it_never_grows_when_units_leave(tiny: CostModel) -> None:
    noisy = table_of(tiny)
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: {n: cost + float(torch.rand((), generator=generator)) for n, cost in costs.items()}
        for name, costs in noisy.modules.items()
    }
    assert any(a > b for costs in modules.values() for a, b in itertools.pairwise(costs.values()))
    cost = LookupCost(tiny.axes, table_of(tiny, modules=modules), MODEL)
    for axis in tiny.axes:
        if axis.name in modules:
            amounts = [
                milliseconds(cost, {axis.name: (torch.arange(axis.size) < n).float()}) for n in range(axis.size + 1)
            ]
            assert all(more >= fewer - 1e-12 for fewer, more in itertools.pairwise(amounts))


@pytest.mark.parametrize("values", [[1.0, 2.0], [2.0, 1.0], [3.0, 1.0, 2.0, 2.0, 9.0, 0.0], [5.0]])
def test_monotone_is_the_nearest_nondecreasing_sequence(values: list[float]) -> None:
    found = monotone(values)
    assert sum(found) == pytest.approx(sum(values)) and found == sorted(found)
    distance = sum((a - b) ** 2 for a, b in zip(found, values, strict=True))
    grid = [min(values) + (max(values) - min(values)) * i / 12 for i in range(13)]
    for other in itertools.combinations_with_replacement(grid, len(values)):
        assert distance <= sum((a - b) ** 2 for a, b in zip(other, values, strict=True)) + 1e-9


def test_what_is_not_measured_is_counted_or_refused(tiny: CostModel) -> None:
    alone, beside = LookupCost(tiny.axes, table_of(tiny), MODEL), LookupCost(tiny.axes, table_of(tiny), MODEL, tiny)
    name = next(axis.name for axis in tiny.axes if axis.kind == Kind.HEAD)
    masks = {name: torch.tensor([1.0, *[0.0] * (next(a.size for a in tiny.axes if a.name == name) - 1)])}
    assert torch.equal(beside(masks).count("blocks"), tiny(masks).count("blocks"))
    assert beside.even("blocks") and not beside.even("milliseconds")
    with pytest.raises(ValueError, match="of='blocks' is not in a table of milliseconds"):
        alone().count("blocks")
    with pytest.raises(ValueError, match="of='milliseconds' does not follow from the shapes"):
        tiny().count("milliseconds")
    hidden = next(axis for axis in tiny.axes if axis.kind == Kind.HIDDEN)
    assert milliseconds(alone, {"hidden": torch.ones(hidden.size)}) == milliseconds(alone)
    with pytest.raises(ValueError, match="does not tell what units of hidden cost"):
        alone({"hidden": torch.zeros(hidden.size)})


def test_a_table_of_another_model_is_refused_by_the_field_that_differs(tiny: CostModel) -> None:
    table = table_of(tiny)
    with pytest.raises(ValueError, match="another model: hidden_size is 64 in it, 128 here"):
        LookupCost(tiny.axes, table, {**MODEL, "hidden_size": 128})
    with pytest.raises(ValueError, match="another model: batch is 8 in it, absent here"):
        LookupCost(tiny.axes, table, {"hidden_size": 64, "device": "cpu"})
    with pytest.raises(ValueError, match="another model: dtype is absent in it, float32 here"):
        LookupCost(tiny.axes, table, {**MODEL, "dtype": "float32"})
    name = next(axis.name for axis in tiny.axes if axis.kind == Kind.CHANNEL)
    size = next(axis.size for axis in tiny.axes if axis.name == name)
    for costs, message in (
        ({**table.modules[name], size + 1: 9.0}, f"{name} has {size + 1} units in it, {size} here"),
        ({0: 0.0, size - 1: 1.0}, f"{name} has {size - 1} units in it, {size} here"),
    ):
        with pytest.raises(ValueError, match=message):
            LookupCost(tiny.axes, table_of(tiny, modules={**table.modules, name: costs}), MODEL)
    with pytest.raises(ValueError, match=r"it measures layers\.99\.heads, which is not here"):
        LookupCost(tiny.axes, table_of(tiny, modules={"layers.99.heads": {1: 0.1}}), MODEL)


def test_a_table_comes_back_from_its_json_and_nonsense_is_refused(tiny: CostModel) -> None:
    table = table_of(tiny)
    assert CostTable.from_json(table.to_json()) == table
    with pytest.raises(ValueError, match="not a cost table"):
        CostTable.from_json("[1, 2]")
    for wrong, message in (
        ({"modules": {"a": {2: float("nan")}}}, "a with 2 units costs nan"),
        ({"modules": {"a": {2: -1.0}}}, "a with 2 units costs -1.0"),
        ({"modules": {"a": {}}}, "a has no cost"),
        ({"modules": {"a": {-1: 1.0, 2: 2.0}}}, "a has no cost"),
        ({"fixed": float("inf")}, "the fixed part costs inf"),
        ({"of": "watts"}, "a table of 'watts' is unknown; give one of blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            table_of(tiny, **wrong)


def test_bytes_are_counted_by_the_bits_of_each_weight(tiny: CostModel) -> None:
    bits = {weight.name: 4.0 if weight.macs else 16.0 for weight in tiny.weights}
    cost = CostModel(tiny.axes, tiny.weights, bits)
    name = next(axis.name for axis in tiny.axes if axis.kind == Kind.CHANNEL)
    size = next(axis.size for axis in tiny.axes if axis.name == name)
    for masks in (None, {name: (torch.arange(size) < 2).float()}):
        counts = cost(masks)
        matrices = counts.macs  # every entry of a matrix is one multiply-accumulate
        assert float(counts.count("bytes")) == float(matrices / 2 + (counts.total - matrices) * 2)
        assert torch.equal(counts.count("blocks"), tiny(masks).count("blocks"))
    assert Budget(0.5, of="bytes").limit(cost) == int(float(cost().count("bytes")) / 2)
    with pytest.raises(ValueError, match="give the bits of its weights"):
        tiny().count("bytes")
    with pytest.raises(ValueError, match=r"bits of '.*' are missing"):
        CostModel(tiny.axes, tiny.weights, {})


def test_a_model_that_has_lost_all_its_modules_costs_the_fixed_part() -> None:
    empty = LookupCost((), CostTable(model=MODEL, modules={}, fixed=1.25, of="milliseconds"), MODEL)
    assert milliseconds(empty) == 1.25
