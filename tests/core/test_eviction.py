"""Scores of cached tokens. Oracles: written-out numbers and loops."""

import torch

from compresso.core.eviction import best, difference_scores, norm_scores, pooled, recency_scores


def test_keys_of_low_norm_stay() -> None:
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]]])
    assert norm_scores(keys).tolist() == [[[-5.0, -1.0, -10.0]]]


def test_the_key_that_is_unlike_the_mean_stays_and_free_slots_do_not_count() -> None:
    keys = torch.tensor([[[[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-9.0, 0.0]]]])
    live = torch.tensor([[[True, True, True, False]]])
    scores = difference_scores(keys, live)
    units = [key / key.norm() for key in keys[0, 0, :3]]
    mean = sum(units) / 3
    wanted = [-float(key @ mean / (key.norm() * mean.norm())) for key in keys[0, 0, :3]]
    torch.testing.assert_close(scores[0, 0, :3], torch.tensor(wanted))
    assert best(scores, live, torch.tensor([1]))[0, 0].tolist() == [False, False, True, False]


def test_the_first_tokens_and_the_latest_stay() -> None:
    places = torch.tensor([[[2, 3, 4, 5, 6, 7]], [[7, 6, 5, 4, 3, 2]]])
    scores = recency_scores(places, sinks=torch.tensor([1, 1]), first=torch.tensor([2, 2]))
    kept = best(scores, torch.ones_like(places, dtype=torch.bool), torch.tensor([3, 2]))
    assert places[0][kept[0]].tolist() == [2, 6, 7] and sorted(places[1][kept[1]].tolist()) == [2, 7]


def test_smoothing_is_a_mean_over_the_neighbours_there_are() -> None:
    assert pooled(torch.tensor([[[0.0, 3.0, 6.0, 0.0]]]), 3).tolist() == [[[1.5, 3.0, 3.0, 3.0]]]


def test_ties_and_budgets_above_what_is_live() -> None:
    live = torch.tensor([[[True, False, True, True]]])
    kept = best(torch.ones(1, 1, 4), live, torch.tensor([2]))
    assert kept[0, 0].tolist() == [True, False, True, False]
    assert torch.equal(best(torch.ones(1, 1, 4), live, torch.tensor([9])), live)
