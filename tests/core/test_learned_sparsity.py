"""Learned shares of zeros: mixtures over rates, masks, landing. Oracle: numbers worked out by hand and in float64 from
the authors' formulas (candidates 1, .5, 0; logits 0, 1, 2; ten columns).
"""

import pytest
import torch
from torch import Tensor

from compresso.core.learned_sparsity import (
    candidate_rates,
    channel_error,
    counts_of,
    first_ranks,
    landed,
    learned_mask,
    logits_for,
    mixture,
    prune_probability,
    ranks_of,
    reachable,
    shares,
)
from compresso.core.sparsity import lowest_in_rows

FINE = candidate_rates(0.01)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(
    ("smooth", "weights", "share", "by_rank"),
    [
        (True, [0.268573, 0.338384, 0.393043], 0.437765, (0.606957, 0.268573)),
        (False, [0.090031, 0.244728, 0.665241], 0.212395, (0.334759, 0.090031)),
    ],
)
def test_the_worked_example(smooth: bool, weights: list[float], share: float, by_rank: tuple[float, float]) -> None:
    rates = candidate_rates(0.5)
    mixed = mixture(torch.tensor([[0.0, 1.0, 2.0]]), smooth)
    assert mixed[0].tolist() == pytest.approx(weights, abs=1e-6)
    assert float(shares(mixed, rates)) == pytest.approx(share, abs=1e-6)
    wanted = [by_rank[0]] * 5 + [by_rank[1]] * 5
    assert prune_probability(mixed, rates, 10)[0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert counts_of(shares(mixed, rates), 10).tolist() == [int(share * 10)]


@pytest.mark.parametrize("columns", [7, 64, 576])
def test_flat_logits_are_half_of_each_row_by_score(columns: int) -> None:
    scores = drawn(9, columns).abs()
    share = shares(mixture(torch.zeros(1, 101)), FINE)
    gone = first_ranks(ranks_of(scores), counts_of(share, columns))
    assert torch.equal(gone, lowest_in_rows(scores, 0.5))


def test_ties_leave_by_index_and_ranks_are_small() -> None:
    ranks = ranks_of(torch.tensor([[2.0, 1.0, 1.0, 2.0]]))
    assert ranks.tolist() == [[2, 0, 1, 3]] and ranks.dtype == torch.int16
    assert ranks_of(torch.zeros(1, 40_000)).dtype == torch.int32


@pytest.mark.parametrize("smooth", [True, False])
def test_probability_falls_with_rank_and_its_mean_is_the_share(smooth: bool) -> None:
    mixed = mixture(drawn(5, 101, scale=3), smooth)
    probability = prune_probability(mixed, FINE, 300)  # every rate takes a whole number of 300
    assert bool((probability.diff(dim=1) <= 0).all())
    torch.testing.assert_close(probability.mean(dim=1), shares(mixed, FINE))
    uneven = prune_probability(mixed, FINE, 37)
    assert bool(((shares(mixed, FINE) - uneven.mean(dim=1)).abs() < 1 / 37).all())


def test_the_gradient_is_that_of_the_soft_mask() -> None:
    ranks, weight = ranks_of(drawn(6, 20).abs()), drawn(6, 20, seed=1).double()
    logits = drawn(6, 101, seed=2).double().requires_grad_(True)

    def soft(given: Tensor) -> Tensor:
        probability = prune_probability(mixture(given), FINE, 20)
        return ((1 - probability.gather(1, ranks.long())) * weight).square().sum()

    assert torch.autograd.gradcheck(soft, (logits,))
    probability = prune_probability(mixture(logits), FINE, 20)
    mask = learned_mask(probability, ranks, torch.full((6,), 11))
    assert set(mask.unique().tolist()) == {0.0, 1.0} and mask.sum(dim=1).tolist() == [9.0] * 6
    (mine,) = torch.autograd.grad((mask * weight).sum(), logits)
    (plain,) = torch.autograd.grad(
        ((1 - prune_probability(mixture(logits), FINE, 20).gather(1, ranks.long())) * weight).sum(), logits
    )
    torch.testing.assert_close(mine, plain)


def test_rows_that_share_a_vector_add_up_in_its_gradient() -> None:
    ranks, weight = ranks_of(drawn(6, 20).abs()), drawn(6, 20, seed=1).double()
    one = drawn(1, 101, seed=2).double().requires_grad_(True)
    each = one.detach().repeat(6, 1).requires_grad_(True)
    found: list[Tensor] = []
    for logits in (one, each):
        mask = learned_mask(prune_probability(mixture(logits), FINE, 20), ranks, torch.full((len(logits),), 11))
        found += torch.autograd.grad((mask * weight).sum(), logits)
    torch.testing.assert_close(found[0], found[1].sum(dim=0, keepdim=True))


@pytest.mark.parametrize("smooth", [True, False])
def test_the_penalty_alone_takes_shares_to_the_one_asked_for(smooth: bool) -> None:
    logits = drawn(4, 101, scale=2).requires_grad_(True)
    adam = torch.optim.Adam([logits], lr=0.05)
    begun = shares(mixture(logits, smooth), FINE).detach()
    for _ in range(200):
        adam.zero_grad()
        ((shares(mixture(logits, smooth), FINE) - 0.5) / 0.5).square().sum().backward()
        adam.step()
    assert bool((begun - 0.5).abs().max() > 0.01)
    assert bool(((shares(mixture(logits, smooth), FINE) - 0.5).abs() < 0.005).all())


@pytest.mark.parametrize("step", [0.01, 0.1, 0.5])
def test_what_is_out_of_reach_behind_a_sigmoid(step: float) -> None:
    rates = candidate_rates(step)
    low, high = reachable(rates, smooth=True)
    found: list[float] = []
    for cut in range(len(rates) + 1):
        for sign in (60.0, -60.0):
            logits = torch.full((1, len(rates)), sign)
            logits[0, :cut] = -sign
            found.append(float(shares(mixture(logits, smooth=True), rates)))
    assert low == pytest.approx(min(found)) and high == pytest.approx(max(found))
    if step == 0.01:
        assert low > 0.37 and high < 0.63
    for end, wanted in ((0, 1.0), (-1, 0.0)):
        logits = torch.full((1, len(rates)), -60.0)
        logits[0, end] = 60.0
        assert float(shares(mixture(logits), rates)) == pytest.approx(wanted, abs=1e-9)
    assert reachable(rates) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("share", "smooth"),
    [(0.5, False), (0.3, False), (0.7, False), (0.97, False), (0.5, True), (0.4, True), (0.6, True)],
)
def test_logits_begin_at_the_share_that_is_asked_for(share: float, smooth: bool) -> None:
    logits = logits_for(share, FINE, smooth)
    assert float(shares(mixture(logits, smooth), FINE)) == pytest.approx(share, abs=1e-9)
    assert bool((logits == 0).all()) == (share == 0.5)


def test_shares_and_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"share=0.7 is out of reach: .* 0.376 to 0.624"):
        logits_for(0.7, FINE, smooth=True)
    with pytest.raises(ValueError, match="fewer than two"):
        candidate_rates(0.5, 0.2, 0.3)
    with pytest.raises(ValueError, match="zeros=7: wanted 0 to 6"):
        landed([torch.tensor([0.5])], [6], 7)


@pytest.mark.parametrize("zeros", [0, 1, 100, 333, 500, 611, 699, 700])
def test_landing_is_exact_and_keeps_the_order_of_shares(zeros: int) -> None:
    learned, columns = [torch.rand(10, generator=torch.Generator().manual_seed(3)), torch.full((15,), 0.5)], [40, 20]
    found = landed(learned, columns, zeros)
    assert sum(int(one.sum()) for one in found.counts) == zeros
    for share, counts, n in zip(learned, found.counts, columns, strict=True):
        assert bool(((counts >= 0) & (counts <= n)).all())
        exact = ((share.double() + found.shift) * n).clamp(0, n)
        assert bool(((counts - exact).abs() <= 1 + 1e-6).all())  # within one weight a row
        assert bool((counts[share.argsort()].diff() >= -1).all())


@pytest.mark.parametrize(
    ("share", "zeros", "rates", "counts"),
    [
        ([0.9, 0.9, 0.9, 0.6], 34, (0.0, 0.9), [9, 9, 9, 7]),  # what is full cannot take what is missing
        ([0.9, 0.2, 0.2, 0.2], 14, (0.2, 1.0), [8, 2, 2, 2]),
        ([0.5, 0.5, 0.5, 0.5], 22, (0.45, 0.55), [6, 6, 5, 5]),  # 5 of 10 each is all that lies within, and 20
        ([0.5, 0.5, 0.5, 0.5], 18, (0.45, 0.55), [5, 5, 4, 4]),
        ([0.42, 0.42, 0.42, 0.42], 17, (0.41, 0.44), [5, 4, 4, 4]),  # nothing lies within
    ],
)
def test_landing_leaves_no_row_beyond_the_rates_where_the_total_allows_it(
    share: list[float], zeros: int, rates: tuple[float, float], counts: list[int]
) -> None:
    (found,) = landed([torch.tensor(share, dtype=torch.float64)], [10], zeros, rates).counts
    assert found.tolist() == counts
    with pytest.raises(ValueError, match=r"zeros=39: wanted 0 to 36, what may leave"):
        landed([torch.tensor(share)], [10], 39, (0.0, 0.9))


def test_shares_that_are_right_already_are_not_moved() -> None:
    found = landed([torch.full((8,), 0.5), torch.full((4,), 0.25)], [10, 8], 48)
    assert found.shift == 0.0
    assert [one.unique().tolist() for one in found.counts] == [[5], [2]]


def test_the_error_counts_each_channel_by_its_own_size() -> None:
    dense = drawn(2, 5, 3) * torch.tensor([1.0, 100.0, 0.01])
    assert float(channel_error(dense * 1.1, dense)) == pytest.approx(0.01, rel=1e-4)
    one = dense.clone()
    one[..., 2] = 0
    assert float(channel_error(one, dense)) == pytest.approx(1 / 3, rel=1e-4)
    dense[..., 2] = 0
    assert float(channel_error(dense * 1.1 + torch.tensor([0.0, 0.0, 1.0]), dense)) == pytest.approx(0.02 / 3, rel=1e-4)
