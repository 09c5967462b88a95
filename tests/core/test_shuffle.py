"""Orders for n:m pruning: they keep more, never less, and nearly as much as the best there is."""

import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from torch import Tensor

from compresso.core.entropy import BINS, entropy, histograms
from compresso.core.shuffle import best_order, dealt, kept, swapped


def randoms(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).abs()


def outlying(rows: int, columns: int, seed: int) -> Tensor:
    """Scores whose columns are of very different size, neighbours alike."""
    return randoms(rows, columns, seed) * torch.logspace(1, -1, columns)


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 24), (1, 4, 20), (4, 8, 32), (3, 4, 12), (1, 2, 10)])
def test_orders_are_permutations_and_swaps_keep_more(n: int, m: int, columns: int) -> None:
    scores = outlying(9, columns, n * m)
    unchanged = torch.arange(columns)
    better, deal = swapped(scores, unchanged, n, m), dealt(scores, m)
    both = swapped(scores, deal, n, m)
    for order in (better, deal, both):
        assert sorted(order.tolist()) == list(range(columns))
    assert kept(scores, better, n, m) > kept(scores, unchanged, n, m)
    assert kept(scores, both, n, m) >= kept(scores, deal, n, m)
    order, shares = best_order(scores, n, m)
    assert kept(scores, order, n, m) == pytest.approx(max(kept(scores, one, n, m) for one in (unchanged, better, both)))
    assert list(shares) == ["unchanged", "swapped", "dealt and swapped"] and shares["unchanged"] == 1


def test_the_largest_means_land_in_groups_of_their_own() -> None:
    scores = torch.arange(12.0).expand(3, 12)
    assert dealt(scores, 4).reshape(3, 4).tolist() == [[11, 8, 5, 2], [10, 7, 4, 1], [9, 6, 3, 0]]


def test_no_single_swap_is_left_that_would_help() -> None:
    scores = outlying(5, 16, 3)
    order = swapped(scores, torch.arange(16), 2, 4)
    best = kept(scores, order, 2, 4)
    for i, j in combinations(range(16), 2):
        other = order.clone()
        other[i], other[j] = order[j], order[i]
        assert kept(scores, other, 2, 4) <= best * (1 + 2e-6)


def test_it_comes_within_a_hundredth_of_the_best_split() -> None:
    """Two groups of four: all 35 splits are tried."""
    shares: list[float] = []
    for seed in range(60):
        scores = randoms(6, 8, seed)
        order, _ = best_order(scores, 2, 4)
        splits = [
            torch.tensor([0, *first, *(i for i in range(1, 8) if i not in first)])
            for first in combinations(range(1, 8), 3)
        ]
        assert len(splits) == 35
        shares.append(kept(scores, order, 2, 4) / max(kept(scores, split, 2, 4) for split in splits))
    assert min(shares) >= 0.99 and max(shares) <= 1 + 1e-6


def test_blocks_are_improved_apart_and_rows_may_be_sampled() -> None:
    scores = outlying(40, 32, 1)
    order = swapped(scores, torch.arange(32), 2, 4, block=16)
    assert sorted(order[:16].tolist()) == list(range(16))
    sampled, shares = best_order(scores, 2, 4, rows=8)
    assert shares["dealt and swapped"] > 1 or shares["swapped"] > 1
    assert sorted(sampled.tolist()) == list(range(32))


def test_equal_scores_stay_as_they_are() -> None:
    order, shares = best_order(torch.zeros(3, 8), 2, 4)
    assert order.tolist() == list(range(8)) and set(shares.values()) == {1.0}


def test_entropies_in_closed_form() -> None:
    assert float(entropy(torch.tensor([[5.0], [0.0]]))[0]) == 0
    assert float(entropy(torch.ones(BINS, 1))[0]) == pytest.approx(math.log(BINS))
    even = torch.linspace(0, 1, 100 * BINS).unsqueeze(1)
    inputs = torch.cat([even, torch.full_like(even, 3.0), even * -7 + 2], dim=1)
    total = histograms(None, inputs)
    found = entropy(total[:BINS])
    assert float(found[0]) == pytest.approx(math.log(BINS), rel=1e-3) and float(found[1]) == 0
    assert float(found[2]) == pytest.approx(float(found[0]), rel=1e-3)  # of an affine map
    torch.testing.assert_close(total[BINS + 2], inputs.double().square().sum(dim=0), rtol=1e-5, atol=1e-5)


def test_later_tokens_beyond_the_range_count_at_its_ends() -> None:
    total = histograms(histograms(None, torch.tensor([[0.0], [1.0]])), torch.tensor([[9.0], [-9.0], [0.5]]))
    assert total[:BINS].sum() == 5 and total[0] == 2 and total[BINS - 1] == 2
    assert (total[BINS], total[BINS + 1]) == (0, 1)


def test_bins_are_of_equal_width_and_closed_below_the_last_one_on_both_sides() -> None:
    """Oracle in whole numbers: of a range of 1024 steps, step k lies in bin floor(100 k / 1024); no quotient is
    rounded.
    """
    steps = torch.cat(
        [torch.tensor([0, 1024]), torch.randint(1025, (3000,), generator=torch.Generator().manual_seed(0))]
    )
    wanted = Counter(min(step * BINS // 1024, BINS - 1) for step in steps.tolist())
    found = histograms(None, torch.stack([steps.float(), steps.float() / 4 - 96], dim=1))
    for channel in range(2):
        assert found[:BINS, channel].tolist() == [wanted[place] for place in range(BINS)]
