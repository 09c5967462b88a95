"""Scores of LoRA-adapted units, against sums over entries written out for two units."""

import math

import pytest
import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind, Slice
from compresso.core.lora_score import Criterion, lora_scores, unit_products

W = {"up": torch.tensor([[1.0, 2.0], [0.0, -3.0]]), "down": torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0]])}
U = {"up": torch.tensor([[0.5, 0.0], [0.0, 1.0]])}
AXIS = Axis("layers.0.channels", Kind.CHANNEL, 2, (Slice("up", 0), Slice("down", 1)), (), "mlp")
GROUPS = [[1.0, 2.0, 2.0, 0.0, 1.0], [0.0, -3.0, 1.0, 1.0, 0.0]]  # rows of up with columns of down
ADDED = [[0.5, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]]


def score(criterion: Criterion, added: dict[str, Tensor] = U) -> list[float]:
    return lora_scores([AXIS], W.get, added.get, {criterion: 1.0}, False)["layers.0.channels"].tolist()


def normalised(values: list[float]) -> list[float]:
    return [value / math.hypot(*values) * math.sqrt(len(values)) for value in values]


def test_products_run_over_rows_and_columns_of_a_unit() -> None:
    wanted = [sum(w * u for w, u in zip(ws, us, strict=True)) for ws, us in zip(GROUPS, ADDED, strict=True)]
    assert unit_products(AXIS, W.get, U.get).tolist() == wanted == [0.5, -3.0]
    assert unit_products(AXIS, W.get, W.get).tolist() == [10.0, 11.0]


def test_wide_units_own_runs_of_rows() -> None:
    axis = Axis("heads", Kind.HEAD, 2, (Slice("q", 0, width=2),), (), "attention")
    q = torch.arange(8.0).reshape(4, 2)
    assert unit_products(axis, {"q": q}.get, {"q": q}.get).tolist() == [0 + 1 + 4 + 9, 16 + 25 + 36 + 49]


def test_each_criterion_is_its_formula_over_the_root_mean_square() -> None:
    size, inner, added = [math.sqrt(10), math.sqrt(11)], [0.5, -3.0], [0.5, 1.0]
    assert score("magnitude") == pytest.approx(normalised(size))
    assert score("average") == pytest.approx(normalised([s / 5 for s in size]))
    assert score("cosine") == pytest.approx(
        normalised([i / (s * a) + 1 for i, s, a in zip(inner, size, added, strict=True)])
    )
    assert score("first") == pytest.approx(normalised([0.5, 3.0]))
    assert score("second") == pytest.approx(normalised([0.125, 4.5]))


def test_criteria_add_up_with_their_weights() -> None:
    both = lora_scores([AXIS], W.get, U.get, {"magnitude": 0.25, "first": 2.0}, False)["layers.0.channels"].tolist()
    assert both == pytest.approx([0.25 * m + 2 * f for m, f in zip(score("magnitude"), score("first"), strict=True)])


def test_fresh_adapters_leave_the_magnitudes_to_decide() -> None:
    """B is zero at first: no criterion divides by zero, and those that read the update are equal for all units."""
    for criterion, wanted in (("cosine", 1.0), ("first", 0.0), ("second", 0.0)):
        assert score(criterion, {}) == pytest.approx([wanted] * 2)  # type: ignore[arg-type]


def test_within_kinds_a_large_unit_does_not_outweigh_a_small_one() -> None:
    """Heads of weight 10 and 30 beside channels of 1 and 3: equal relative to their kind, apart in one pool."""
    tensors = {"q": torch.tensor([[10.0], [30.0]]), "up": torch.tensor([[1.0], [3.0]])}
    axes = [Axis(name, kind, 2, (Slice(name, 0),), (), "") for name, kind in (("q", Kind.HEAD), ("up", Kind.CHANNEL))]
    apart, together = (lora_scores(axes, tensors.get, {}.get, {"magnitude": 1.0}, within) for within in (True, False))
    assert apart["q"].tolist() == pytest.approx(apart["up"].tolist())
    assert together["q"].tolist() == pytest.approx((10 * together["up"]).tolist())


def test_units_that_own_whole_tensors_are_refused() -> None:
    layers = Axis("layers", Kind.LAYER, 1, (Slice("up", 0, unit=0),), (), "layers")
    with pytest.raises(ValueError, match="only heads and channels"):
        unit_products(layers, W.get, W.get)
