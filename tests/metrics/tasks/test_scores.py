"""Scores and their means in closed form."""

import math
import statistics

import pytest

from compresso.metrics.tasks.scores import Score, mean_score, scores_of


def test_mean_and_standard_error_of_items() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    scores = scores_of([{"acc": value, "doc": "x"} for value in values])
    assert scores == {"acc": Score(0.6, pytest.approx(statistics.stdev(values) / math.sqrt(5)), 5)}


def test_a_single_item_has_no_standard_error() -> None:
    assert scores_of([{"acc": 1.0, "acc_norm": 0.0}]) == {"acc": Score(1, None, 1), "acc_norm": Score(0, None, 1)}


def test_means_over_tasks_and_over_items() -> None:
    few, many = Score(1.0, 0.3, 10), Score(0.5, 0.1, 30)
    assert mean_score([few, many], "tasks") == Score(0.75, pytest.approx(math.sqrt(0.3**2 + 0.1**2) / 2), 40)
    assert mean_score([few, many], "items") == Score(0.625, pytest.approx(math.hypot(0.3 / 4, 0.1 * 3 / 4)), 40)
    assert mean_score([few, Score(1.0, None, 1)], "tasks").stderr is None


def test_the_mean_over_items_is_that_of_all_items_together() -> None:
    first, second = [1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0, 1.0]
    parts = [scores_of([{"acc": value} for value in part])["acc"] for part in (first, second)]
    assert mean_score(parts, "items").value == pytest.approx(statistics.mean(first + second))
