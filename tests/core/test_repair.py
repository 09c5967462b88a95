"""The laws of the least-squares repair: what it returns, and why each of its defaults is what it is."""

import math

import pytest
import torch
from torch import Tensor

from compresso.core.obs import NotPositiveDefiniteError
from compresso.core.repair import SINKS, Moments, error, gathered, refitted, sinks, token_weights, tokens_wanted

N_IN, N_OUT = 12, 7


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Moments:
    return gathered(None, inputs, [targets], token_weights(targets) if weights is None else weights)


def objective(weight: Tensor, old: Tensor, inputs: Tensor, targets: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """The stated objective, from tokens and not from moments."""
    missed = (targets.double() - inputs.double() @ weight.T).square().sum(dim=1)
    scale = (weights.double().unsqueeze(1) * inputs.double().square()).sum(dim=0).mean()
    return (weights.double() * missed).sum() + ridge * scale * (weight - old.double()).square().sum()


@pytest.mark.parametrize("ridge", [0.003, 0.3, 30.0])
def test_the_fit_is_the_minimiser_of_the_stated_objective(ridge: float) -> None:
    inputs, targets, old = draw(50, N_IN, seed=0), draw(50, N_OUT, seed=1), draw(N_OUT, N_IN, seed=2)
    weights = token_weights(targets)
    seen = moments(inputs, targets)
    found = refitted(old, seen.inputs, seen.cross_of(1.0), ridge).requires_grad_()
    value = objective(found, old, inputs, targets, weights, ridge)
    (slope,) = torch.autograd.grad(value, found)
    (steepest,) = torch.autograd.grad(
        objective(start := old.double().requires_grad_(), old, inputs, targets, weights, ridge), start
    )
    assert float(slope.norm()) < 1e-5 * float(steepest.norm())
    for seed in range(3):
        moved = found.detach() + 1e-3 * draw(N_OUT, N_IN, seed=10 + seed)
        assert objective(moved, old, inputs, targets, weights, ridge) > value


def test_with_all_inputs_kept_the_old_weight_comes_back() -> None:
    inputs, old = draw(200, N_IN, seed=3), draw(N_OUT, N_IN, seed=4)
    seen = moments(inputs, inputs @ old.T)
    assert torch.allclose(refitted(old, seen.inputs, seen.cross_of(1.0), 0.3), old.double(), atol=1e-6)
    start = old + draw(N_OUT, N_IN, seed=5)  # and without a ridge worth the name from anywhere
    assert torch.allclose(refitted(start, seen.inputs, seen.cross_of(1.0), 1e-9), old.double(), atol=1e-4)


def test_an_endless_ridge_is_the_old_weight() -> None:
    inputs, targets, old = draw(50, N_IN, seed=6), draw(50, N_OUT, seed=7), draw(N_OUT, N_IN, seed=8)
    seen = moments(inputs, targets)
    assert torch.allclose(refitted(old, seen.inputs, seen.cross_of(1.0), 1e9), old.double(), atol=1e-7)


def test_an_input_that_is_always_zero_keeps_its_old_weight() -> None:
    inputs, targets, old = draw(50, N_IN, seed=9), draw(50, N_OUT, seed=10), draw(N_OUT, N_IN, seed=11)
    inputs[:, 4] = 0
    seen = moments(inputs, targets)
    assert torch.allclose(refitted(old, seen.inputs, seen.cross_of(1.0), 0.3)[:, 4], old[:, 4].double(), atol=1e-12)


def test_mixtures_are_linear_between_the_two_targets() -> None:
    inputs, old = draw(60, N_IN, seed=12), draw(N_OUT, N_IN, seed=13)
    dense, residual = draw(60, N_OUT, seed=14), draw(60, N_OUT, seed=15)
    seen = gathered(None, inputs, [dense, residual], token_weights(residual))
    ends = [refitted(old, seen.inputs, seen.cross_of(alpha), 0.3) for alpha in (0.0, 1.0)]
    assert torch.allclose(refitted(old, seen.inputs, seen.cross_of(0.25), 0.3), 0.75 * ends[0] + 0.25 * ends[1])
    alone = gathered(None, inputs, [dense], token_weights(residual))
    assert torch.allclose(ends[0], refitted(old, alone.inputs, alone.cross_of(0.7), 0.3))


def test_moments_add_up_and_tell_the_error_of_any_weight() -> None:
    inputs, targets, weight = draw(40, N_IN, seed=16), draw(40, N_OUT, seed=17), draw(N_OUT, N_IN, seed=18)
    weights = token_weights(targets)
    whole = gathered(None, inputs, [targets], weights)
    parts = gathered(None, inputs[:13], [targets[:13]], weights[:13])
    parts = gathered(parts, inputs[13:], [targets[13:]], weights[13:])
    assert parts.tokens == whole.tokens == 40
    assert torch.allclose(parts.inputs, whole.inputs, rtol=1e-5, atol=1e-6)
    assert torch.allclose(parts.cross, whole.cross, rtol=1e-5, atol=1e-6)
    missed = (weights * (targets - inputs @ weight.T).square().sum(dim=1)).sum()
    assert math.isclose(error(weight, whole), float(missed / 40), rel_tol=1e-4)  # each target weighs 1
    assert math.isclose(error(torch.zeros_like(weight), whole), 1.0, rel_tol=1e-6)


def test_weights_are_one_over_squared_norms_and_bounded_for_targets_near_zero() -> None:
    targets = draw(9, N_OUT, seed=19)
    assert torch.allclose(token_weights(targets), 1 / targets.square().sum(dim=1))
    targets[0] = 0
    found = token_weights(targets)
    assert float(found[0]) == pytest.approx(1e4 / float(targets.square().sum(dim=1).median()), rel=1e-4)
    assert bool(token_weights(torch.zeros(3, N_OUT)).isfinite().all())


def test_tokens_that_draw_attention_count_a_fifth_of_all_others_together() -> None:
    targets = draw(120, N_OUT, seed=20)
    targets[7] *= 300
    drawing = torch.tensor([i in (0, 7, 40, 80) for i in range(120)])
    boost = token_weights(targets, row=40) * targets.square().sum(dim=1)
    assert torch.allclose(boost, torch.where(drawing, SINKS * 116 / 4, 1.0), rtol=1e-5)
    alone = token_weights(targets) * targets.square().sum(dim=1)
    assert torch.allclose(alone, torch.where(torch.arange(120) == 7, SINKS * 119, 1.0), rtol=1e-5)
    assert sinks(torch.ones(8), 2).tolist() == [1] * 8  # many of them count what they are
    assert sinks(torch.ones(3), 0).tolist() == [1, 1, 1]


def test_what_one_token_in_hundreds_needs_is_kept() -> None:
    """The first token of each text is massive by one column that hardly anything else uses. Nothing of it is to change,
    and what all others lost goes along with that column: a fit in which it counts one in hundreds gives it away.
    """
    n_in, row, texts = 20, 400, 3
    old = draw(N_OUT, n_in, seed=21)
    first = torch.arange(row * texts) % row == 0
    inputs = draw(row * texts, n_in, seed=22)
    inputs[:, 0] *= 0.3
    inputs[first] *= 0.01
    inputs[first, 0] = 20
    targets = inputs @ old.T + torch.where(first, 0.0, inputs[:, 0]).unsqueeze(1) * 10 * draw(1, N_OUT, seed=24)
    missed = list[float]()
    for rows in (0, row):
        weights = token_weights(targets, rows) if rows else 1 / targets.square().sum(dim=1)
        seen = gathered(None, inputs, [targets], weights)
        weight = refitted(old, seen.inputs, seen.cross_of(1.0), 0.03)
        off = targets[first].double() - inputs[first].double() @ weight.T
        missed.append(float(off.norm() / targets[first].norm()))
    assert missed[1] < missed[0] / 4 and missed[0] > 0.2


class Planted:
    """A layer that lost half of its inputs, and text whose windows of 10 tokens begin with a sink.

    A sink is a thousand times as large as other tokens, in one kept channel that these hardly use; what was removed
    gave it nothing, so that the old weight serves it well. Others lost what a map of the kept channels gives back in
    part, and the sinks' channel happens to go along with it.
    """

    def __init__(self, tokens: int = 400, seed: int = 0) -> None:
        self.dense = draw(N_OUT, 2 * N_IN, seed=100 + seed) / N_IN**0.5
        self.old = self.dense[:, :N_IN]
        self.mix = draw(N_IN, N_IN, seed=102 + seed) / N_IN**0.5
        self.calibration, self.unseen = self.text(tokens, 200 + seed), self.text(400, 300 + seed)

    def text(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs [tokens, in] that are left, and dense outputs [tokens, out]."""
        kept = draw(tokens, N_IN, seed=seed)
        gone = kept @ self.mix.T + 0.5 * draw(tokens, N_IN, seed=seed + 1)
        kept[:, 0] *= 0.1
        kept[::10], gone[::10] = 0.1 * kept[::10], 0.0
        kept[::10, 0] = 1000.0
        return kept, torch.cat([kept, gone], dim=1) @ self.dense.T

    def relative(self, weight: Tensor) -> tuple[float, float]:
        """Relative errors of sinks, and of all else, on text that was not calibrated on."""
        inputs, targets = self.unseen
        missed = (targets - inputs @ weight.float().T).square().sum(dim=1)
        sizes, sinks = targets.square().sum(dim=1), torch.arange(len(inputs)) % 10 == 0
        return (
            float((missed[sinks].sum() / sizes[sinks].sum()).sqrt()),
            float((missed[~sinks].sum() / sizes[~sinks].sum()).sqrt()),
        )

    def fit(self, even: bool = False, ridge: float = 0.3, sinks: bool = True, pull: bool = True) -> Tensor:
        inputs, targets = self.calibration
        stay = torch.ones(len(inputs), dtype=torch.bool)
        if not sinks:
            stay[::10] = False
        seen = moments(inputs[stay], targets[stay], torch.ones(int(stay.sum())) if even else None)
        old = self.old if pull else torch.zeros_like(self.old)
        return refitted(old, seen.inputs, seen.cross_of(1.0), ridge)


@pytest.mark.parametrize("seed", range(5))
def test_planted_sinks_spoil_a_fit_that_does_not_weigh_them_and_one_that_leaves_them_out_but_not_ours(
    seed: int,
) -> None:
    planted = Planted(seed=7 * seed)
    old, ours = planted.relative(planted.old), planted.relative(planted.fit())
    even, without = planted.relative(planted.fit(even=True)), planted.relative(planted.fit(sinks=False))
    assert ours[1] < 0.9 * old[1]
    assert ours[0] < 0.1
    assert even[1] > 0.99 * old[1]  # sinks decide the ridge and the fit: nothing else is mended
    assert without[0] > 3 * ours[0]  # sinks are broken, and all that later layers make of them


def test_a_ridge_that_pulls_to_the_old_weight_is_worth_having_on_few_tokens() -> None:
    """Without one, and with one that pulls to zero, unseen text fares worse."""
    planted = [Planted(tokens=16, seed=11 * seed) for seed in range(8)]

    def rest(ridge: float, pull: bool = True) -> float:
        return sum(one.relative(one.fit(ridge=ridge, pull=pull))[1] for one in planted) / len(planted)

    assert rest(0.3) < rest(1e-6)
    assert rest(0.3) < rest(0.3, pull=False)
    assert rest(0.3) < sum(one.relative(one.old)[1] for one in planted) / len(planted)


def test_what_is_not_finite_is_refused() -> None:
    inputs, targets, old = draw(20, N_IN, seed=20), draw(20, N_OUT, seed=21), draw(N_OUT, N_IN, seed=22)
    seen = moments(inputs, targets)
    with pytest.raises(NotPositiveDefiniteError):
        refitted(old, seen.inputs * math.nan, seen.cross_of(1.0))
    with pytest.raises(NotPositiveDefiniteError):
        refitted(old, seen.inputs, seen.cross_of(1.0) * math.inf)
    with pytest.raises(NotPositiveDefiniteError):
        refitted(old, torch.zeros_like(seen.inputs), seen.cross_of(1.0))
    with pytest.raises(ValueError, match="ridge=0"):
        refitted(old, seen.inputs, seen.cross_of(1.0), 0.0)


def test_eight_tokens_a_column_are_wanted() -> None:
    assert tokens_wanted(1536) == 12288
