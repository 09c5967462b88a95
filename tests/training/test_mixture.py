"""Shares of sources follow what was lost; draws follow the shares and nothing else."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from compresso.training.mixture import MixedBatches, shares

ALL = torch.tensor([True, True, True])
ROWS = torch.tensor([10, 30, 60])


def test_shares_are_in_proportion_to_losses_of_the_running_stage() -> None:
    assert shares(torch.tensor([0.2, 0.6, 5.0]), torch.tensor([True, True, False]), ROWS).tolist() == pytest.approx(
        [0.25, 0.75, 0]
    )


@pytest.mark.parametrize("lost", [[0.0, 0.0, 0.0], [-1.0, -0.5, 0.0]])
def test_where_nothing_was_lost_rows_decide(lost: list[float]) -> None:
    assert shares(torch.tensor(lost), ALL, ROWS).tolist() == pytest.approx([0.1, 0.3, 0.6])


def drawn(wanted: list[float], updates: int, batch: int = 32) -> list[tuple[int, int]]:
    sources = [list(range(n)) for n in ROWS.tolist()]
    batches = MixedBatches(
        sources, batch, lambda rows: {"x": torch.tensor(rows)}, 3, lambda update: torch.tensor(wanted)
    )
    return [one for update in range(updates) for one in batches.drawn(update, range(batch))]


def test_draws_follow_the_shares_and_reach_every_row() -> None:
    """3200 draws: a share's standard error is below 0.01."""
    seen = drawn([0.5, 0.0, 0.5], 100)
    counts = Counter(source for source, _ in seen)
    assert counts[1] == 0
    assert counts[0] / len(seen) == pytest.approx(0.5, abs=0.04)
    assert {index for source, index in seen if source == 2} == set(range(60))


def test_an_update_s_rows_do_not_depend_on_how_it_is_split() -> None:
    def collate(rows: list[int]) -> dict[str, Tensor]:
        return {"x": torch.tensor(rows)}

    batches = MixedBatches([[1, 2, 3], [4, 5, 6, 7]], 8, collate, 0, lambda update: torch.tensor([0.5, 0.5]))
    whole = batches.at(5, range(8))["x"]
    assert torch.equal(whole, torch.cat([batches.at(5, range(4))["x"], batches.at(5, range(4, 8))["x"]]))
    assert not torch.equal(whole, batches.at(6, range(8))["x"])
