"""Levels, weights and plans from made-up orders, without a model."""

from dataclasses import replace

import pytest
import torch

from compresso.core.axis import Kind
from compresso.core.obs_groups import damped
from compresso.errors import NumericError
from compresso.solve.bank import Bank, Ladder, SubLayer, columns, levels, plan, weights_at


def made_up(kind: Kind = Kind.MLP) -> SubLayer:
    ladder = Ladder(1, tuple(reversed(range(40))), tuple(float(i) for i in range(41)))
    return SubLayer(2, kind, "layers.2.down", "layers.2.channels", 1, 1, 0, (ladder,), (), 40.0, 0.01)


def test_levels_of_channels_lie_on_the_grid_and_the_dense_one_changes_no_bit() -> None:
    one = made_up()
    assert [level.units for level in levels(one)] == [40, 32, 16, 0]
    assert [level.units for level in levels(one, 8)] == [40, 32, 24, 16, 8, 0]
    assert [level.error for level in levels(one)] == [0, 8, 24, 40]
    assert levels(one)[1].relative == pytest.approx((8 / 40) ** 0.5)
    assert columns(one, levels(one)[2]).tolist() == list(range(16))
    weight, moment = torch.randn(5, 40).bfloat16(), torch.eye(40)
    dense = weights_at(one, levels(one)[0], weight, moment)
    assert torch.equal(dense, weight) and dense.data_ptr() != weight.data_ptr()
    assert not weights_at(one, levels(one)[-1], weight, moment).any()
    assert weights_at(one, levels(one)[1], weight, moment).dtype == torch.bfloat16


def test_a_plan_names_what_leaves_and_a_block_takes_its_sub_layers_with_it() -> None:
    one = made_up()
    bank = Bank({}, 4, {one.name: one}, dict.fromkeys(range(4), 1.0))
    assert plan(bank, {one.name: levels(one)[0]}).kept == {}
    assert plan(bank, {one.name: levels(one)[1]}).kept == {"layers.2.channels": tuple(range(32))}
    assert plan(bank, {one.name: levels(one)[-1]}).kept == {"mlp": (0, 1, 3)}
    assert plan(bank, {one.name: levels(one)[1]}, without=[2]).kept == {"layers": (0, 1, 3)}
    with pytest.raises(KeyError):
        plan(replace(bank, blocks={}), {}, without=[2])
    with pytest.raises(KeyError):
        plan(bank, {"layers.9.mlp": levels(one)[0]})


def test_weights_follow_the_moment_that_they_are_fitted_to() -> None:
    one, generator = made_up(), torch.Generator().manual_seed(0)
    weight = torch.randn(6, 40, generator=generator)
    mixes = [torch.randn(40, 40, generator=generator) for _ in range(2)]
    moments = [mix @ mix.T for mix in mixes]
    level = levels(one)[1]
    fitted = [weights_at(one, level, weight, moment) for moment in moments]
    for moment, mine, other in ((moments[0], *fitted), (moments[1], fitted[1], fitted[0])):
        cost = damped(moment)[0]
        lost = [float(torch.trace((w - weight).double() @ cost @ (w - weight).double().T)) for w in (mine, other)]
        assert lost[0] < lost[1]


def test_damping_holds_fits_of_few_tokens_to_the_old_weights() -> None:
    """A sample of fewer tokens than columns: a fit that follows it loses more on other tokens than one that is held."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=generator)
    few, many = (torch.randn(n, 40, generator=generator) @ mix for n in (30, 4000))
    one, weight = made_up(), torch.randn(6, 40, generator=generator)
    level = levels(one)[1]

    def lost(damping: float) -> float:
        """The error on the other tokens."""
        found = weights_at(one, level, weight, few.T @ few, damping)
        return float((many @ (found - weight).T).square().mean())

    assert lost(0.3) < 0.8 * lost(0.01)
    held = [weights_at(one, level, weight, few.T @ few, damping)[:, :32] for damping in (1.0, 1e6)]
    assert float((held[1] - weight[:, :32]).abs().max()) < 1e-4 < float((held[0] - weight[:, :32]).abs().max())


def test_a_moment_without_an_inverse_is_refused_by_the_name_of_the_linear() -> None:
    one, moment = made_up(), torch.eye(40)
    moment[0, 1] = moment[1, 0] = 9.0
    with pytest.raises(NumericError, match=r"layers\.2\.down: what stays .* not positive definite; give more"):
        weights_at(one, levels(one)[1], torch.ones(2, 40), moment)
