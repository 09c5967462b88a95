"""HESSO's schedule against the closed form of its product, and the half-space step against its geometry."""

import pytest
import torch

from compresso.core.half_space import keep_after, leaves_half_space, shrink_factor


@pytest.mark.parametrize("length", [2, 3, 7, 40])
def test_factors_telescope_to_exact_zero(length: int) -> None:
    """After step t the product is (T - 1 - t) / (T - 1), and the last is 0.0 itself."""
    product = 1.0
    for t in range(length):
        product *= shrink_factor(t, length)
        assert product == pytest.approx((length - 1 - t) / (length - 1) if t else 1.0, rel=1e-12)
    assert product == 0.0


@pytest.mark.parametrize(("t", "length"), [(0, 1), (-1, 4), (4, 4)])
def test_steps_outside_a_period_are_refused(t: int, length: int) -> None:
    with pytest.raises(ValueError, match="period of"):
        shrink_factor(t, length)


@pytest.mark.parametrize("keep", [0.3, 0.7, 1.0])
def test_periods_take_equal_parts_and_end_on_the_target_itself(keep: float) -> None:
    shares = [1.0, *(keep_after(keep, period, 5) for period in range(1, 6))]
    assert shares[-1] == keep
    assert torch.tensor(shares).diff().tolist() == pytest.approx([(keep - 1) / 5] * 5, abs=1e-6)


def test_a_group_leaves_with_its_trial_behind_the_half_space() -> None:
    """<trial, old> < eps |old|^2: beyond a right angle at eps 0; at eps 0.5 also where less than half is left along the
    old direction.
    """
    old = torch.tensor([[3.0, 4.0]]).expand(5, 2)
    trial = torch.tensor([[3.0, 4.0], [-4.0, 3.0], [-4.1, 3.0], [1.4, 1.9], [0.0, 0.0]])
    inner, squared = (trial * old).sum(1), old.square().sum(1)
    assert leaves_half_space(inner, squared, 0.0).tolist() == [False, False, True, False, False]
    assert leaves_half_space(inner, squared, 0.5).tolist() == [False, True, True, True, True]
