"""A round's removal: never more than it may take, never one unit less than it could, lowest first."""

import pytest
import torch
from tests.core.conftest import Describe
from torch import Tensor

from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.solve.removal import lowest_within

HEAD, CHANNEL = 64 * 8 * 4, 64 * 3  # of the model below: q, k, v, o of one head of 8; gate, up, down of one channel


@pytest.fixture
def cost(describe: Describe) -> CostModel:
    return describe(64, 3, 8, 40, 100)


def scores(cost: CostModel, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        axis.name: torch.rand(axis.size, generator=generator)
        for axis in cost.axes
        if axis.kind in (Kind.HEAD, Kind.CHANNEL)
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.9])
def test_the_lowest_units_leave_until_the_next_would_be_too_much(cost: CostModel, share: float, seed: int) -> None:
    given = scores(cost, seed)
    axes = [axis for axis in cost.axes if axis.name in given]
    dense = int(cost().count("blocks"))
    allowance = int(share * dense)
    plan = lowest_within(axes, given, cost, "blocks", allowance)
    removed = dense - int(cost.of(plan).count("blocks"))
    units = sorted((float(score), axis.name, u, axis.kind) for axis in axes for u, score in enumerate(given[axis.name]))
    gone = [unit for unit in units if unit[2] not in plan.kept[unit[1]]]
    assert gone == units[: len(gone)]
    assert removed == sum(HEAD if kind == Kind.HEAD else CHANNEL for *_, kind in gone) <= allowance
    following = HEAD if units[len(gone)][3] == Kind.HEAD else CHANNEL
    assert removed + following > allowance


def test_units_of_infinite_score_and_the_best_of_a_floor_stay(cost: CostModel) -> None:
    given = scores(cost, 0)
    axes = [axis for axis in cost.axes if axis.name in given]
    given["layers.0.channels"][:] = float("inf")
    plan = lowest_within(axes, given, cost, "blocks", 10**9, fewest={"layers.1.heads": 3})
    kept = {name: len(units) for name, units in plan.kept.items()}
    assert kept.pop("layers.0.channels") == 40
    assert kept.pop("layers.1.heads") == 3
    assert set(kept.values()) == {0}
    assert set(plan.kept["layers.1.heads"]) == set(given["layers.1.heads"].argsort()[-3:].tolist())


def test_ties_go_by_what_is_given_for_them_then_by_order(cost: CostModel) -> None:
    axes = [axis for axis in cost.axes if axis.kind == Kind.CHANNEL]
    same = {axis.name: torch.zeros(40) for axis in axes}
    first = lowest_within(axes, same, cost, "blocks", 2 * CHANNEL)
    assert first.kept["layers.0.channels"] == tuple(range(2, 40))
    prior = {axis.name: torch.ones(40) for axis in axes}
    prior["layers.2.channels"][7], prior["layers.1.channels"][5] = 0.1, 0.2
    plan = lowest_within(axes, same, cost, "blocks", 2 * CHANNEL, ties=prior)
    assert [40 - len(plan.kept[axis.name]) for axis in axes] == [0, 1, 1]
    assert 7 not in plan.kept["layers.2.channels"]
    assert 5 not in plan.kept["layers.1.channels"]


def test_nothing_leaves_where_the_lowest_unit_is_too_much(cost: CostModel) -> None:
    axes = [axis for axis in cost.axes if axis.kind == Kind.HEAD]
    given = scores(cost, 0)
    assert lowest_within(axes, given, cost, "blocks", HEAD - 1).is_noop(axes)
    assert not lowest_within(axes, given, cost, "blocks", HEAD).is_noop(axes)


@pytest.mark.parametrize("bad", [torch.zeros(7), torch.full((8,), float("nan")), torch.full((8,), -float("inf"))])
def test_unusable_scores_are_refused(cost: CostModel, bad: Tensor) -> None:
    given = {**scores(cost, 0), "layers.2.heads": bad}
    with pytest.raises(ValueError, match=r"scores for layers\.2\.heads are missing, NaN"):
        lowest_within([axis for axis in cost.axes if axis.name in given], given, cost, "blocks", 10)
