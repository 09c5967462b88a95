"""Two levels of units on one dimension: counted as what both keep, in expectation too."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from tests.core.conftest import Describe
from torch import Tensor

from compresso.core.axis import Axis, Gate, Kind, Slice
from compresso.core.cost import CostModel
from compresso.core.grid import grids
from compresso.core.plan import Plan


def queries(cost: CostModel, layer: int, slots: int) -> list[Axis]:
    """The query heads of each key/value head of a layer of `tiny`, or one of its kind."""
    heads = next(axis for axis in cost.axes if axis.name == f"layers.{layer}.heads")
    wide = heads.slices[0].width
    return [
        Axis(
            f"{heads.name}.{g}.queries",
            Kind.QUERY,
            slots,
            tuple(Slice(piece.param, piece.dim, wide // slots, start=g * wide) for piece in heads.slices[::3]),
            (),
            heads.container,
            layer,
            min_units=1,
            within=(heads.name, g),
        )
        for g in range(heads.size)
    ]


@pytest.fixture
def divided(tiny: CostModel) -> CostModel:
    """`tiny` with the two query heads of each of its two key/value heads."""
    return CostModel([*tiny.axes, *queries(tiny, 0, 2), *queries(tiny, 1, 2)], tiny.weights)


def drawn(cost: CostModel, seed: int, *, hard: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) for axis in cost.axes}
    return {name: (value > 0.4).double() if hard else value for name, value in values.items()}


def test_masks_that_name_no_query_head_count_as_if_there_were_none(tiny: CostModel, divided: CostModel) -> None:
    assert divided().parameters() == tiny().parameters()
    for masks in (drawn(tiny, 1, hard=True), drawn(tiny, 1, hard=False), {}):
        named = {**masks, "layers.0.heads.1.queries": torch.ones(2)}
        for field in ("total", "blocks", "macs", "cached"):
            assert torch.equal(getattr(divided(masks), field), getattr(tiny(masks), field))
            assert float(getattr(divided(named), field)) == pytest.approx(float(getattr(tiny(masks), field)), rel=1e-14)
    names = [axis.name for axis in tiny.axes if axis.kind in (Kind.HEAD, Kind.CHANNEL)]
    totals = torch.arange(1.0, 5.0, dtype=torch.float64)
    assert divided.of_totals(names, totals).parameters() == tiny.of_totals(names, totals).parameters()


@pytest.mark.parametrize("seed", range(3))
def test_what_both_keep_is_counted(divided: CostModel, seed: int) -> None:
    masks = drawn(divided, seed, hard=True)
    hidden, blocks = int(masks["hidden"].sum()), 0
    cached = 0
    for i in range(2):
        heads = masks[f"layers.{i}.heads"]
        kept = [float(h) * float(masks[f"layers.{i}.heads.{g}.queries"].sum()) for g, h in enumerate(heads)]
        blocks += 2 * hidden * 4 * round(sum(kept)) + 2 * hidden * 4 * int(heads.sum())  # q and o, k and v
        blocks += 3 * hidden * int(masks[f"layers.{i}.channels"].sum())
        cached += 2 * 4 * int(heads.sum())
    assert int(divided(masks).blocks) == blocks == int(divided(masks).macs) - 10 * hidden
    assert int(divided(masks).cached) == cached


def test_keep_probabilities_count_what_is_expected(divided: CostModel) -> None:
    """All 2^6 outcomes of one layer's gates, weighed by their chances."""
    names = ["layers.0.heads", "layers.0.heads.0.queries", "layers.0.heads.1.queries"]
    chances = {name: drawn(divided, 4, hard=False)[name] for name in names}
    flat = torch.cat(list(chances.values()))
    expected = 0.0
    for outcome in product((0.0, 1.0), repeat=6):
        bits = torch.tensor(outcome, dtype=torch.float64)
        chance = float((bits * flat + (1 - bits) * (1 - flat)).prod())
        expected += chance * float(divided(dict(zip(names, bits.split(2), strict=True))).blocks)
    assert float(divided(chances).blocks) == pytest.approx(expected, rel=1e-12)


def test_totals_alone_do_not_decide_what_they_cost(divided: CostModel) -> None:
    names = ["layers.0.heads", "layers.0.heads.0.queries"]
    assert divided.tiled(names[:1]) and not divided.tiled(names)
    with pytest.raises(ValueError, match=r"units of layers\.0\.heads\.0\.queries lie within those of another axis"):
        divided.of_totals(names, torch.ones(2, dtype=torch.float64))


def test_a_plan_of_units_that_are_not_counted_is_refused(tiny: CostModel, divided: CostModel) -> None:
    plan = Plan({f"layers.0.heads.{g}.queries": (g,) for g in range(2)})
    assert int(divided().blocks - divided.of(plan).blocks) == 2 * 2 * 4 * 16
    with pytest.raises(ValueError, match=r"the plan names layers\.0\.heads\.0\.queries, which is not counted"):
        tiny.of(plan)


def test_axes_that_do_not_lie_in_their_units_alike_are_refused(tiny: CostModel, describe: Describe) -> None:
    first, second = queries(tiny, 0, 2)
    assert len(grids([*tiny.axes, first, second])) == 2
    moved = replace(second, slices=first.slices)
    fewer = replace(second, size=1, slices=tuple(replace(piece, width=8) for piece in second.slices))
    for odd, words in (
        ([first], "within 1 of 2 units of layers.0.heads; wanted one in each"),
        ([first, replace(second, within=("layers.7.heads", 1))], "unit 1 of layers.7.heads, which is not there"),
        ([first, replace(second, within=("layers.0.heads", 0))], "unit 0 of layers.0.heads, which is not there or tak"),
        ([first, moved], "do not lie in its unit alike"),
        ([first, fewer], "do not lie in its unit alike"),
    ):
        with pytest.raises(ValueError, match=words):
            CostModel([*tiny.axes, *odd], tiny.weights)


def test_a_gate_of_a_part_leaves_the_rest_as_it_is() -> None:
    gate = Gate("o", "input", 2, start=4, of=12)
    mask = torch.tensor([[0.5, 0.0], [1.0, 0.25]])
    assert gate.spread(mask[0]).tolist() == [1, 1, 1, 1, 0.5, 0.5, 0, 0, 1, 1, 1, 1]
    assert gate.spread(mask)[1].tolist() == [1] * 6 + [0.25] * 2 + [1] * 4
    assert gate.entries(torch.arange(12), 2).tolist() == [[4, 5], [6, 7]]
