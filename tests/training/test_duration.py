"""Durations are updates, whatever they are written in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresso.errors import RecipeError
from compresso.training.duration import shortened, updates


def test_published_lengths_in_updates() -> None:
    """Compresso's script: GPT4-Alpaca's 52,002 examples, batch 1, one epoch each."""
    assert updates("1 epoch", 52_002, 1) == 52_002
    assert updates("5 epochs", 52_002, 8) == 5 * 6_501


@pytest.mark.parametrize("bad", [-1, "two epochs", "3", "1 epoch more", True, None])
def test_what_is_no_duration_is_refused(bad: object) -> None:
    with pytest.raises(RecipeError, match="is not understood; wanted updates"):
        updates(bad, 10, 1)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=4), st.integers(4, 500))
def test_shortened_phases_meet_the_cap_and_lose_no_phase(phases: list[int], most: int) -> None:
    result = shortened(phases, most)
    assert sum(result) <= most or result == phases
    if sum(phases) > most:
        assert sum(result) == most
    assert all((after > 0) == (before > 0) for before, after in zip(phases, result, strict=True))
