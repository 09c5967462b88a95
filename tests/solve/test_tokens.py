"""Which tokens stay, by hand on a vocabulary of six."""

import pytest
import torch

from compresso.core.budget import InfeasibleBudget
from compresso.solve.tokens import keep_tokens, shares

PARTS = {0: [0], 1: [1], 2: [2], 3: [1, 2, 3], 4: [3, 1, 2, 4], 5: [5]}
"""4 is made of 3, which is made of 1 and 2."""
USED = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.6, 0.3])


def made_of(i: int) -> list[int]:
    return PARTS[i]


def test_shares_are_counts_over_all_tokens() -> None:
    assert shares([[1, 1, 2], [1]], 4).tolist() == [0, 0.75, 0.25, 0]
    assert shares([], 3).tolist() == [0, 0, 0]


def test_used_tokens_stay_with_all_they_are_made_of() -> None:
    assert keep_tokens(USED, (), made_of) == (1, 2, 3, 4, 5)
    assert keep_tokens(USED, [0], made_of, threshold=0.1) == (0, 1, 2, 3, 4, 5), "2 stays as a part of 4"
    assert keep_tokens(USED, [0], made_of, threshold=0.6) == (0,)


def test_a_limit_passes_over_what_does_not_fit_whole() -> None:
    assert keep_tokens(USED, [0], made_of, most=3) == (0, 2, 5), "4 would need three more"
    assert keep_tokens(USED, [0], made_of, most=5) == (0, 1, 2, 3, 4)


def test_the_number_is_filled_up_to_a_multiple() -> None:
    assert keep_tokens(USED, (), made_of, threshold=0.2, multiple_of=6) == (0, 1, 2, 3, 4, 5)
    assert keep_tokens(USED, (), made_of, threshold=0.5, multiple_of=4) == (1, 2, 3, 4)
    assert len(keep_tokens(USED, (), made_of, threshold=0.5, multiple_of=4, most=5)) == 4, "5 is no multiple"


def test_a_limit_below_what_must_stay_is_refused() -> None:
    with pytest.raises(InfeasibleBudget, match="most=2 tokens, but 3 of 6 must be kept"):
        keep_tokens(USED, [3], made_of, most=2)
