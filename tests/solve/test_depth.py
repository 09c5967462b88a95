"""Dropping parts: the lowest scores, or one run of layers, within what a budget or a number says."""

from collections.abc import Callable

import pytest
import torch

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget, InfeasibleBudget
from compresso.core.cost import CostModel
from compresso.solve.depth import drop_lowest, drop_run, parts_of, without


@pytest.fixture
def cost(describe: Callable[..., CostModel]) -> CostModel:
    """Five layers; attention and MLP are of different size."""
    return describe(16, 5, 4, 24, 10, depth=True)


def axes_of(cost: CostModel, *kinds: Kind) -> list[Axis]:
    return [axis for axis in cost.axes if axis.kind in kinds]


def test_the_lowest_leave_and_of_equal_ones_the_first(cost: CostModel) -> None:
    axes = axes_of(cost, Kind.ATTENTION, Kind.MLP)
    scores = {"attention": torch.tensor([3.0, 1.0, 5.0, 5.0, 2.0]), "mlp": torch.tensor([2.0, 9.0, 1.0, 9.0, 9.0])}
    assert drop_lowest(axes, scores, 3).kept == {"attention": (0, 2, 3), "mlp": (0, 1, 3, 4)}
    assert drop_lowest(axes, scores, 4).kept["mlp"] == (1, 3, 4)  # of the two 2.0 the attention went before


def test_parts_that_are_gone_are_none(cost: CostModel) -> None:
    (mlp,) = axes_of(cost, Kind.MLP)
    fewer = Axis("mlp", Kind.MLP, 5, tuple(piece for piece in mlp.slices if piece.unit != 1), (), "model.layers")
    assert parts_of([fewer]) == [("mlp", 0), ("mlp", 2), ("mlp", 3), ("mlp", 4)]
    assert drop_lowest([fewer], {"mlp": torch.zeros(5)}, 2).kept == {"mlp": (1, 3, 4)}


def test_more_than_may_leave_is_refused(cost: CostModel) -> None:
    layers = axes_of(cost, Kind.LAYER)
    with pytest.raises(
        InfeasibleBudget, match="drop=5: the model has 5 layers, of which at most 4 may leave; lower drop to 4"
    ):
        drop_lowest(layers, {"layers": torch.zeros(5)}, 5)
    with pytest.raises(InfeasibleBudget, match="lower drop to 4"):
        drop_run(layers[0], torch.zeros(6, 6), cost, Budget(1.0, kinds=(Kind.LAYER,)), 5)
    with pytest.raises(InfeasibleBudget, match=r"Raise keep to 0\.2"):
        drop_run(layers[0], torch.zeros(6, 6), cost, Budget(0.1, kinds=(Kind.LAYER,)))


@pytest.mark.parametrize(("keep", "left"), [(1.0, 5), (0.8, 4), (0.79, 3), (0.2, 1)])
def test_a_run_is_as_short_as_the_budget_takes(cost: CostModel, keep: float, left: int) -> None:
    (layers,) = axes_of(cost, Kind.LAYER)
    distances = torch.rand(6, 6, generator=torch.Generator().manual_seed(2))
    kept = drop_run(layers, distances, cost, Budget(keep, kinds=(Kind.LAYER,))).kept["layers"]
    assert len(kept) == left
    gone = sorted(set(range(5)) - set(kept))
    assert gone == list(range(gone[0], gone[0] + 5 - left)) if gone else left == 5


def test_without_keeps_the_rest(cost: CostModel) -> None:
    axes = axes_of(cost, Kind.ATTENTION, Kind.MLP)
    assert without(axes, [("mlp", 4), ("mlp", 0)]).kept == {"attention": (0, 1, 2, 3, 4), "mlp": (1, 2, 3)}
