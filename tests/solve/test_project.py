"""Gates land on their budget: exactly in expectation, and within one smallest unit in what is kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresso.core.axis import Kind
from compresso.core.budget import Budget, InfeasibleBudget
from compresso.core.cost import CostModel
from compresso.core.hard_concrete import (
    LOG_ALPHA_HIGH,
    LOG_ALPHA_LOW,
    clamp_,
    expected_kept,
    keep_probability,
    soft_value,
)
from compresso.core.plan import Plan
from compresso.solve.project import deterministic_to_budget, reachable, shift_to_budget

Describe = Callable[..., CostModel]
KINDS = (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN)


def gates(
    cost: CostModel, seed: int, spread: float = 2.0, dtype: torch.dtype = torch.float64, kinds: Any = KINDS
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        a.name: (torch.randn(a.size, generator=generator) * spread + 1).to(dtype) for a in cost.axes if a.kind in kinds
    }


def share(cost: CostModel, log_alpha: dict[str, Tensor], of: Any = "blocks") -> float:
    return float(cost({name: keep_probability(gate) for name, gate in log_alpha.items()}).count(of) / cost().count(of))


@settings(deadline=None, max_examples=60)
@given(
    keep=st.floats(0.02, 0.99),
    seed=st.integers(0, 1000),
    spread=st.floats(0, 4),
    of=st.sampled_from(["blocks", "total", "macs"]),
    kinds=st.sampled_from([KINDS, (Kind.HEAD, Kind.CHANNEL), (Kind.CHANNEL, Kind.HIDDEN)]),
)
def test_a_shift_and_a_clamp_end_exactly_on_the_budget(
    tiny: CostModel, keep: float, seed: int, spread: float, of: Any, kinds: tuple[Kind, ...]
) -> None:
    log_alpha = gates(tiny, seed, spread, kinds=kinds)
    least, most = reachable(log_alpha, tiny, of)
    if not least <= keep <= most:
        with pytest.raises(InfeasibleBudget, match=f"keep={keep} of {of} is out of reach"):
            shift_to_budget(log_alpha, tiny, keep, of)
        return
    shift = shift_to_budget(log_alpha, tiny, keep, of)
    moved = {name: clamp_(gate + shift) for name, gate in log_alpha.items()}
    assert share(tiny, moved, of) == pytest.approx(keep, rel=1e-9)
    assert shift_to_budget(moved, tiny, keep, of) == pytest.approx(0, abs=1e-6)


def test_without_clamped_gates_the_shift_is_the_plain_one(llama_7b: CostModel) -> None:
    log_alpha = gates(llama_7b, 0, spread=0.3)
    shift = shift_to_budget(log_alpha, llama_7b, 0.7)
    assert share(llama_7b, {name: gate + shift for name, gate in log_alpha.items()}) == pytest.approx(0.7, rel=1e-9)


def test_float32_gates_land_as_well_as_float32_can(llama_7b: CostModel) -> None:
    log_alpha = gates(llama_7b, 1, dtype=torch.float32)
    shift = shift_to_budget(log_alpha, llama_7b, 0.7)
    moved = {name: clamp_(gate + shift) for name, gate in log_alpha.items()}
    assert share(llama_7b, moved) == pytest.approx(0.7, rel=1e-6)


def test_reachable_is_what_clamped_gates_express(llama_7b: CostModel) -> None:
    closed, open_ = (
        float(keep_probability(torch.tensor(end, dtype=torch.float64))) for end in (LOG_ALPHA_LOW, LOG_ALPHA_HIGH)
    )
    assert reachable(gates(llama_7b, 0), llama_7b) == pytest.approx((closed**2, open_**2))
    assert 1 - open_**2 == pytest.approx(0.0040, abs=1e-4)
    for keep in reachable(gates(llama_7b, 0), llama_7b):
        shift_to_budget(gates(llama_7b, 0), llama_7b, keep)


def test_gates_that_diverged_or_belong_to_no_axis_are_refused(tiny: CostModel) -> None:
    log_alpha = gates(tiny, 0)
    log_alpha["hidden"][3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        shift_to_budget(log_alpha, tiny, 0.5)
    with pytest.raises(ValueError, match=r"unknown: \['hiden'\]"):
        shift_to_budget({"hiden": torch.zeros(16)}, tiny, 0.5)
    with pytest.raises(ValueError, match=r"keep=1\.5 is not a share"):
        shift_to_budget(gates(tiny, 0), tiny, 1.5)


def test_the_shift_leaves_gates_and_their_gradients_alone(tiny: CostModel) -> None:
    log_alpha = {name: gate.requires_grad_() for name, gate in gates(tiny, 0).items()}
    before = {name: gate.detach().clone() for name, gate in log_alpha.items()}
    assert isinstance(shift_to_budget(log_alpha, tiny, 0.5), float)
    assert all(torch.equal(before[name], gate.detach()) and gate.grad is None for name, gate in log_alpha.items())


def ruled_by(gates: torch.Tensor) -> torch.Tensor:
    """One axis by the deterministic rule: as many of its lowest gates [n] at 0 as are expected to be."""
    mask = torch.ones_like(gates)
    mask[gates.sort(stable=True).indices[: len(gates) - expected_kept(gates)]] = 0
    return mask


def kept_count(cost: CostModel, masks: dict[str, Tensor]) -> float:
    return float(cost({name: (mask > 0).double() for name, mask in masks.items()}).blocks)


@settings(deadline=None, max_examples=30)
@given(
    keep=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
    spread=st.floats(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_final_masks_are_on_the_budget_and_nothing_more_fits(
    tiny: CostModel, keep: float, seed: int, spread: float, dtype: torch.dtype
) -> None:
    log_alpha = gates(tiny, seed, spread, dtype)
    masks = deterministic_to_budget(log_alpha, tiny.axes, tiny, keep)
    Plan.from_masks(tiny.axes, masks).check(tiny.axes)
    limit = Budget(keep).limit(tiny)
    assert kept_count(tiny, masks) <= limit
    for name, mask in masks.items():
        stays = mask > 0
        assert mask.dtype == dtype
        assert torch.equal(mask[stays], soft_value(log_alpha[name])[stays])  # unshifted
        if not bool(stays.all()):
            order = log_alpha[name].sort(stable=True).indices
            assert stays[order].int().diff().ge(0).all()  # the lowest go first
            wider = mask.clone()
            wider[order[int((~stays).sum()) - 1]] = 1
            assert kept_count(tiny, {**masks, name: wider}) > limit


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_final_masks_follow_the_deterministic_rule_at_one_shift(describe: Describe, keep: float) -> None:
    cost = describe(64, 4, 8, 176, 128)
    log_alpha = gates(cost, 0)
    masks = deterministic_to_budget(log_alpha, cost.axes, cost, keep)
    low, high = -20.0, 20.0
    for _ in range(45):
        middle = (low + high) / 2
        ruled = {name: ruled_by(gate + middle) for name, gate in log_alpha.items()}
        low, high = (middle, high) if kept_count(cost, ruled) <= keep * float(cost().blocks) else (low, middle)
    ruled = {name: ruled_by(gate + low) for name, gate in log_alpha.items()}
    back = {name: int((mask > 0).sum()) - int((ruled[name] > 0).sum()) for name, mask in masks.items()}
    assert all(bool(((ruled[name] == 0) | (mask > 0)).all()) for name, mask in masks.items())
    assert 0 <= sum(back.values()) <= 64
    assert keep * float(cost().blocks) - kept_count(cost, masks) < 3 * 64


def test_llama_7b_lands_within_one_channel(llama_7b: CostModel) -> None:
    masks = deterministic_to_budget(gates(llama_7b, 0, dtype=torch.float32), llama_7b.axes, llama_7b, 0.7)
    assert 0 <= 0.7 * 6_476_005_376 - kept_count(llama_7b, masks) < 3 * 4096


def test_final_masks_keep_the_fewest_units_that_must_stay(tiny: CostModel) -> None:
    axes = [replace(axis, min_units=2) if axis.name == "layers.0.heads" else axis for axis in tiny.axes]
    cost = CostModel(axes, tiny.weights)
    log_alpha = gates(cost, 0)
    log_alpha["layers.0.heads"] -= 20
    masks = deterministic_to_budget(log_alpha, axes, cost, 0.3)
    assert (masks["layers.0.heads"] > 0).tolist() == [True, True]
    assert kept_count(cost, masks) <= 0.3 * float(cost().blocks)


def test_masks_that_cannot_get_small_enough_are_refused(tiny: CostModel) -> None:
    with pytest.raises(
        InfeasibleBudget, match=r"keep=0\.3 allows 1,152 of 3,840 block parameters, but at least 1,536 are kept"
    ):
        deterministic_to_budget(gates(tiny, 0, kinds=(Kind.CHANNEL,)), tiny.axes, tiny, 0.3)
