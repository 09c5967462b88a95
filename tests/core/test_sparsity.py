"""Selections: exact counts, ties by index, n of m kept; scores and allocations against worked numbers of the papers'
algorithms.
"""

import pytest
import torch

from compresso.core.sparsity import (
    at_most_threshold,
    count_of,
    lowest,
    lowest_in_groups,
    lowest_in_rows,
    lowest_mass,
    lowest_share,
    outlier_weighted,
    outliers,
    parse_pattern,
    wanda_score,
)


def randoms(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12, 15])
def test_the_lowest_are_those_of_a_stable_sort(count: int) -> None:
    scores = torch.randint(0, 4, (50, 12), generator=torch.Generator().manual_seed(1)).float()  # full of ties
    wanted = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], True)
    assert torch.equal(lowest(scores, count), wanted)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_counts_are_exact(share: float) -> None:
    scores = randoms(7, 30).abs()
    assert int(lowest_share(scores, share).sum()) == count_of(share, 210)
    assert lowest_in_rows(scores, share).sum(dim=1).tolist() == [count_of(share, 30)] * 7
    assert int(lowest_share(torch.ones(7, 30), share).sum()) == count_of(share, 210)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_n_stay_of_every_m(n: int, m: int) -> None:
    scores = randoms(5, 24).abs()
    gone = lowest_in_groups(scores, n, m).reshape(5, -1, m)
    assert bool(((~gone).sum(dim=2) == n).all())
    grouped = scores.reshape(5, -1, m)
    kept_least = grouped.masked_fill(gone, float("inf")).amin(dim=2)
    assert bool((grouped.masked_fill(~gone, -1).amax(dim=2) <= kept_least).all())


@pytest.mark.parametrize("m", [2, 3, 4, 8, 9, 16])
def test_groups_lose_what_a_stable_sort_puts_first(m: int) -> None:
    scores = torch.randint(0, 3, (40, 3 * m), generator=torch.Generator().manual_seed(m)).float()  # full of ties
    for n in range(1, m):
        order = scores.reshape(-1, m).argsort(dim=1, stable=True)[:, : m - n]
        wanted = torch.zeros(120, m, dtype=torch.bool).scatter_(1, order, True).reshape(scores.shape)
        assert torch.equal(lowest_in_groups(scores, n, m), wanted)


@pytest.mark.parametrize("values", ["distinct", "tied", "tiny", "negative"])
def test_a_long_matrix_loses_what_a_stable_sort_puts_first(values: str) -> None:
    scores = randoms(1, 5000, 3)
    scores = {
        "distinct": scores.abs(),
        "tied": (scores * 4).round().abs(),
        "tiny": scores.abs() * 1e-42,
        "negative": scores,
    }[values]
    for share in (0.0002, 0.1, 0.5, 0.9, 0.9998):
        wanted = torch.zeros(5000, dtype=torch.bool)
        wanted[scores[0].argsort(stable=True)[: count_of(share, 5000)]] = True
        assert torch.equal(lowest_share(scores.reshape(50, 100), share), wanted.reshape(50, 100))


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="2:4 needs a multiple of 4 inputs, and there are 350"):
        lowest_in_groups(torch.ones(2, 350), 2, 4)
    for text in ("4:2", "2:2", "0:4", "2/4", "2:4:8", ""):
        with pytest.raises(ValueError, match="n kept of every m"):
            parse_pattern(text)


def test_the_reference_takes_one_more_and_all_ties() -> None:
    scores = randoms(16, 16).abs()
    assert int(at_most_threshold(scores, 0.5).sum()) == 129
    assert int(lowest_share(scores, 0.5).sum()) == 128
    assert int(at_most_threshold(torch.ones(4, 4), 0.5).sum()) == 16
    assert int(at_most_threshold(scores, 1.0).sum()) == 256
    assert not at_most_threshold(scores, 0.0).any()


def test_golden_wanda_scores() -> None:
    x = torch.tensor([[2.0, -1, 0, 1, 3, -2], [1, 0, 2, -1, 1, 0], [0, 3, -1, 2, -2, 1], [-1, 1, 1, 0, 2, -3]])
    squares = x.square().sum(dim=1)
    assert squares.tolist() == [19, 7, 19, 16]
    score = wanda_score(torch.tensor([[3.0, -1, 2, 1], [1, 2, -2, 4]]), squares)
    wanted = torch.tensor([[13.076697, 2.645751, 8.717798, 4], [4.358899, 5.291503, 8.717798, 16]])
    torch.testing.assert_close(score, wanted)
    kept = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert torch.equal(~lowest_in_rows(score, 0.5), kept)
    assert torch.equal(~lowest_in_groups(score, 2, 4), kept)
    second = wanda_score(torch.tensor([[1, -2, 0.5, 3], [4, 0.1, -1, 0.2]]), torch.tensor([2, 0.04, 32, 0.01]))
    torch.testing.assert_close(second, torch.tensor([[1.414214, 0.4, 2.828427, 0.3], [5.656854, 0.02, 5.656854, 0.02]]))


def test_wanda_minds_neither_the_data_s_scale_nor_one_moved_between_weight_and_input() -> None:
    weight, squares = randoms(6, 20), randoms(1, 20, 2)[0].square()
    mask = lowest_in_rows(wanda_score(weight, squares), 0.5)
    assert torch.equal(lowest_in_rows(wanda_score(weight, 16 * squares), 0.5), mask)
    factor = 2.0 ** torch.arange(20).remainder(5)
    assert torch.equal(lowest_in_rows(wanda_score(weight / factor, squares * factor.square()), 0.5), mask)
    equal = wanda_score(weight, torch.ones(20))
    assert torch.equal(lowest_in_rows(equal, 0.5), lowest_in_rows(weight.abs(), 0.5))


def test_the_variant_meets_the_share_with_rows_that_differ() -> None:
    scores = randoms(40, 200).abs() * torch.linspace(0.1, 3, 200) ** 2
    mask, alpha = lowest_mass(scores, 0.5)
    assert abs(float(mask.double().mean()) - 0.5) <= 1e-3
    assert 0 < alpha < 0.8
    assert len(set(mask.sum(dim=1).tolist())) > 1
    for row, gone in zip(
        scores, mask, strict=True
    ):  # the mass that goes is alpha's share, and one more would be too much
        assert float(row[gone].sum()) <= alpha * float(row.sum()) + 1e-4
        assert float(row[gone].sum() + row[~gone].min()) > alpha * float(row.sum()) - 1e-4


def test_the_variant_s_edges() -> None:
    mask, alpha = lowest_mass(torch.tensor([[1.0, 2, 3, 4, 10]]), 0.6)
    assert mask.tolist() == [[True, True, True, False, False]]
    assert alpha == 0.4  # 8 of 20
    out_of_reach, _ = lowest_mass(torch.tensor([[1.0, 1, 1, 1]]), 1.0)
    assert int(out_of_reach.sum()) == 3
    none, _ = lowest_mass(torch.tensor([[5.0, 5]]), 0.0)
    assert not none.any()


def test_owl_s_shares_average_and_spread_as_asked() -> None:
    shares = outlier_weighted([1.2, 3, 2, 5], 0.7, 0.08)
    assert sum(shares) / 4 == pytest.approx(0.7)
    assert max(shares) - min(shares) == pytest.approx(0.16)
    assert shares[3] == min(shares)
    assert outlier_weighted([2, 2], 0.6, 0.08) == [0.6, 0.6]
    assert min(outlier_weighted([0, 1], 0.05, 0.2)) == 0.01


def test_outliers_are_counted_over_the_block() -> None:
    scores = [torch.ones(2, 10), torch.cat([torch.full((1, 9), 1.0), torch.full((1, 1), 31.0)], dim=1)]
    assert outliers(scores, 5) == pytest.approx(100 / 30)
