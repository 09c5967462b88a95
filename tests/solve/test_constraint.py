"""Budgets on learned gates: gaps vanish exactly where the expected counts meet the target, and projection puts them
there.
"""

import pytest
import torch

from compresso.core import hard_concrete
from compresso.core.axis import Axis, Kind, Slice
from compresso.core.cost import CostModel, Group, Weight
from compresso.core.gates import Gates
from compresso.solve.constraint import CountsPerLayer, ShareOfModel


def model(layers: int = 3, heads: int = 8, channels: int = 24) -> tuple[list[Axis], CostModel]:
    """A decoder as the counter sees it: q and o of `heads` heads of 4, up and down of `channels`, hidden 16, no hidden
    axis.
    """
    axes: list[Axis] = []
    weights: list[Weight] = []
    for i in range(layers):
        weights += [
            Weight(f"{i}.q", (heads * 4, 16), Group.BLOCKS, 1),
            Weight(f"{i}.o", (16, heads * 4), Group.BLOCKS, 1),
        ]
        weights += [
            Weight(f"{i}.up", (channels, 16), Group.BLOCKS, 1),
            Weight(f"{i}.down", (16, channels), Group.BLOCKS, 1),
        ]
        axes.append(
            Axis(f"layers.{i}.heads", Kind.HEAD, heads, (Slice(f"{i}.q", 0, 4), Slice(f"{i}.o", 1, 4)), (), "", i)
        )
        axes.append(
            Axis(
                f"layers.{i}.channels", Kind.CHANNEL, channels, (Slice(f"{i}.up", 0), Slice(f"{i}.down", 1)), (), "", i
            )
        )
    return axes, CostModel(axes, weights)


def random_gates(axes: list[Axis], seed: int = 0) -> Gates:
    generator = torch.Generator().manual_seed(seed)
    return Gates(axes, {axis.name: torch.randn(axis.size, generator=generator) for axis in axes})


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.7, 0.95])
def test_projection_holds_the_whole_models_budget(keep: float) -> None:
    axes, cost = model()
    constraint, gates = ShareOfModel(cost, keep), random_gates(axes)
    gates.shift_(constraint.project(gates, 1.0))
    assert constraint.sparsity(gates.keep_probabilities()).item() == pytest.approx(1 - keep, abs=1e-6)
    (gap,) = constraint.gaps(gates.keep_probabilities(), 1.0)
    assert gap.shape == (1,)
    assert gap.item() == pytest.approx(0, abs=1e-6)


def test_projection_on_the_way_goes_as_far_as_gates_can_open() -> None:
    """Clamped gates never open fully: at the start of a ramp the nearest count is taken instead of an error."""
    axes, cost = model()
    constraint, gates = ShareOfModel(cost, 0.5), random_gates(axes)
    gates.shift_(constraint.project(gates, 0.0))
    assert torch.allclose(gates.log_alpha, torch.full_like(gates.log_alpha, hard_concrete.LOG_ALPHA_HIGH), atol=1e-4)


def test_projection_per_layer_gives_each_axis_its_count() -> None:
    axes, cost = model()
    constraint = CountsPerLayer(axes, {Kind.HEAD: 5, Kind.CHANNEL: 10}, cost)
    gates = random_gates(axes)
    gates.shift_(constraint.project(gates, 1.0))
    for axis in axes:
        wanted = 5 if axis.kind == Kind.HEAD else 10
        assert gates.keep_probabilities()[axis.name].sum().item() == pytest.approx(wanted, abs=1e-4)
    gaps = constraint.gaps(gates.keep_probabilities(), 1.0)
    assert [tuple(gap.shape) for gap in gaps] == [(3,), (3,)]
    assert all(float(gap.detach().abs().max()) < 1e-4 for gap in gaps)


def test_the_target_follows_progress() -> None:
    axes, cost = model()
    assert ShareOfModel(cost, 0.6).target(0.5) == pytest.approx(0.2)
    per_layer = CountsPerLayer(axes, {Kind.HEAD: 4, Kind.CHANNEL: 12}, cost)
    assert per_layer.target(0.0) == pytest.approx(0)
    assert per_layer.target(1.0) == pytest.approx(0.5)


def test_a_shift_keeps_the_order_of_the_gates() -> None:
    axes, cost = model()
    gates = random_gates(axes)
    before = gates.log_alpha.detach().argsort()
    gates.shift_(ShareOfModel(cost, 0.4).project(gates, 1.0))
    free = (gates.log_alpha > hard_concrete.LOG_ALPHA_LOW) & (gates.log_alpha < hard_concrete.LOG_ALPHA_HIGH)
    assert free.sum() > 50
    assert torch.equal(gates.log_alpha.detach().argsort()[: int(free.sum())], before[: int(free.sum())])


def test_a_gap_per_layer_is_expected_minus_wanted_sparsity_by_hand() -> None:
    """Halfway to 4 of 8 heads and 12 of 24 channels, 6 and 18 are wanted: a layer with more has too little sparsity, a
    negative gap.
    """
    axes, cost = model()
    constraint = CountsPerLayer(axes, {Kind.HEAD: 4, Kind.CHANNEL: 12}, cost)
    open_share = {"heads": (1.0, 0.75, 0.5), "channels": (0.5, 1.0, 0.875)}
    probabilities = {
        f"layers.{layer}.{name}": torch.full((axes[2 * layer + place].size,), open_share[name][layer])
        for layer in range(3)
        for place, name in enumerate(("heads", "channels"))
    }
    found = dict(zip(sorted((Kind.HEAD, Kind.CHANNEL)), constraint.gaps(probabilities, 0.5), strict=True))
    assert found[Kind.HEAD].tolist() == [-0.25, 0, 0.25]
    assert found[Kind.CHANNEL].tolist() == [0.25, -0.25, -0.125]
