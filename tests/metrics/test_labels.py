"""A classifier's score is what counting by hand gives, whatever the batches; and the guard's thresholds are where they
say.
"""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from compresso.errors import DataError, NumericError
from compresso.metrics.label_guard import judge_labels
from compresso.metrics.labels import ACCURACY, F1, GUESS, LabelScore, label_score
from compresso.metrics.record import Environment
from compresso.tasks.classification import CLASSIFICATION


class LastToken(nn.Module):
    """Says the class that its last real token is, modulo 3, and is as sure of it as it was told."""

    device = torch.device("cpu")

    def __init__(self, sure: float = 2.0) -> None:
        super().__init__()
        self.sure = sure

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> SimpleNamespace:
        last = input_ids.gather(1, attention_mask.sum(1, keepdim=True) - 1).squeeze(1)
        return SimpleNamespace(logits=self.sure * nn.functional.one_hot(last % 3, 3).float())


ROWS = [
    {"input_ids": ids, "labels": [label]}
    for ids, label in (([1, 3], 0), ([4], 1), ([1, 1, 1, 5], 2), ([2], 0), ([9, 9, 3], 0), ([7], 1), ([8], 1))
]


def scored(model: nn.Module, size: int = 3):  # type: ignore[no-untyped-def]
    return label_score(model, ROWS, lambda rows: CLASSIFICATION.collate(rows, 0), size)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 3, 32])
def test_accuracy_and_loss_are_those_of_a_count_by_hand(size: int) -> None:
    score = scored(LastToken().train(), size)
    assert score.right == (True, True, True, False, True, True, False)
    assert score.accuracy == 5 / 7 and score.guess == 3 / 7
    sure = math.log(2 + math.exp(2)) - 2
    assert score.nats == pytest.approx([sure + 2 * (not right) for right in score.right])
    assert score.mean == pytest.approx(sum(score.nats) / 7)
    accuracy, guess = score.measurements(Environment.here(), "mine")
    assert (accuracy.name, accuracy.value, accuracy.n) == (ACCURACY, 5 / 7, 7)
    assert accuracy.stderr == pytest.approx(math.sqrt(5 / 7 * 2 / 7 / 7))
    assert (guess.name, guess.value, guess.how) == (GUESS, 3 / 7, "counted")


def test_f1_is_that_of_the_second_of_two_labels() -> None:
    """Against the definition by precision and recall, with an error that a jackknife agrees with."""
    draw = random.Random(0)
    second = [draw.random() < 0.7 for _ in range(400)]
    right = [draw.random() < (0.9 if one else 0.6) for one in second]
    score = LabelScore((0.1,) * 400, tuple(right), 200, "", tuple(second))
    said = [one == hit for one, hit in zip(second, right, strict=True)]

    def f1(chosen: list[int]) -> float:
        hits = sum(said[i] and second[i] for i in chosen)
        precision, recall = hits / sum(said[i] for i in chosen), hits / sum(second[i] for i in chosen)
        return 2 * precision * recall / (precision + recall)

    value, error = score.f1
    assert value == pytest.approx(f1(list(range(400)))) and value != score.accuracy
    without = [f1([j for j in range(400) if j != i]) for i in range(400)]
    mean = sum(without) / 400
    assert error == pytest.approx(math.sqrt(399 / 400 * sum((one - mean) ** 2 for one in without)), rel=0.02)
    assert [one.name for one in score.measurements(Environment.here(), "t")] == [ACCURACY, GUESS, F1]
    assert LabelScore((0.1,), (True,), 1, "", (False,)).f1 == (0.0, None)
    assert scored(LastToken()).second == ()  # three labels have no F1


def test_the_mode_is_put_back_and_what_cannot_be_scored_says_so() -> None:
    model = LastToken().train()
    scored(model)
    assert model.training
    with pytest.raises(NumericError, match="not finite"):
        scored(LastToken(math.inf))
    with pytest.raises(DataError, match="0 held-out examples"):
        label_score(model, [], lambda rows: {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dense", "pruned", "verdict"),
    [
        (0.9, 0.89, "ok"),
        (0.9, 0.861, "ok"),  # 90 % of the lead of 40 points
        (0.9, 0.859, "warn"),
        (0.9, 0.701, "warn"),
        (0.9, 0.699, "refuse"),
        (0.9, 0.3, "refuse"),
        (0.9, 0.95, "ok"),
        (0.55, 0.54, "unchecked"),  # within two standard errors of the guess, 0.5 +- 0.1
    ],
)
def test_the_guard_judges_the_lead_over_the_most_frequent_label(dense: float, pruned: float, verdict: str) -> None:
    assert judge_labels(dense, pruned, 0.5, 100).verdict == verdict


def test_the_guard_refuses_what_is_no_better_than_a_guess_even_of_a_small_lead() -> None:
    found = judge_labels(0.62, 0.59, 0.5, 100)  # three quarters of the lead, but within two standard errors
    assert found.verdict == "refuse"
    assert [one.verdict for one in found.checks] == ["warn", "refuse"]
    assert "refused up to 60.0%" in found.message()


@pytest.mark.parametrize(
    ("dense", "pruned", "verdict"),
    [
        (0.69, 0.7, "unchecked"),  # 53 % of 32 examples are told apart from a guess by nothing
        (0.69, 2.0, "warn"),
        (0.69, 13_721.0, "refuse"),
        (1.2, 2.0, "unchecked"),  # a dense model that is as sure of what is wrong
    ],
)
def test_the_guard_judges_a_loss_where_accuracies_say_nothing(dense: float, pruned: float, verdict: str) -> None:
    found = judge_labels(0.688, 0.531, 0.531, 32, losses=(dense, pruned), labels=2)
    assert found.verdict == verdict
    if verdict != "unchecked":
        assert f"went from {dense:.4g} to {pruned:.4g} nats, where a uniform guess has 0.693" in found.message()
    else:
        assert "68.8% on 32 held-out examples is within two standard errors of" in found.message()
        assert "(53.1%, so up to 70.7%), and what it lost cannot be told" in found.message()


def test_a_loss_is_no_reason_to_refuse_a_classifier_that_is_right() -> None:
    assert judge_labels(0.9, 0.89, 0.5, 1000, losses=(0.3, 0.8), labels=2).verdict == "ok"
    assert judge_labels(0.9, 0.89, 0.5, 1000, losses=(0.3, None), labels=2).verdict == "ok"


def test_the_guard_says_what_it_could_not_check() -> None:
    assert "for want of data" in judge_labels(None, 0.9, 0.5, 10).message()
    assert "so it has nothing to lose" in judge_labels(0.5, 0.5, 0.5, 10).message()
    with pytest.raises(NumericError, match=r"pruned=1\.5"):
        judge_labels(0.9, 1.5, 0.5, 10)
