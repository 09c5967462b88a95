"""Calibration windows: drawn by the seed, whole, each from an example of its own."""

import pytest

from compresso.core.row import Row
from compresso.data.random_windows import random_windows
from compresso.errors import DataError

ROWS = [
    Row(input_ids=[100 * i + j for j in range(length)], labels=[-100] * length)
    for i, length in enumerate((3, 8, 9, 20, 30))
]


def test_windows_are_consecutive_labelled_and_from_different_examples() -> None:
    windows = random_windows(ROWS, 3, 8, seed=0)
    assert all(window["labels"] == window["input_ids"] for window in windows)
    assert all(
        window["input_ids"] == list(range(window["input_ids"][0], window["input_ids"][0] + 8)) for window in windows
    )
    assert len({window["input_ids"][0] // 100 for window in windows}) == 3


def test_the_seed_decides() -> None:
    assert random_windows(ROWS, 2, 4, seed=5) == random_windows(ROWS, 2, 4, seed=5)
    assert len({str(random_windows(ROWS, 2, 4, seed=seed)) for seed in range(8)}) > 1


def test_every_window_can_be_drawn() -> None:
    starts = {random_windows(ROWS[1:2], 1, 6, seed=seed)[0]["input_ids"][0] for seed in range(40)}
    assert starts == {100, 101, 102}


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="2 of 5 examples have the 12 tokens of a calibration window, wanted 3"):
        random_windows(ROWS, 3, 12, seed=0)
