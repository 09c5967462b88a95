"""OHEM on pixels counted by hand, and mIoU of a 3 x 3 map counted by hand."""

import math

import pytest
import torch
from torch.nn import functional

from compresso.core.losses import IGNORED
from compresso.core.segments import HARD, at_labels, confusion, intersection_over_union, ohem, ohem_loss


def test_the_threshold_is_a_probability_of_seven_tenths() -> None:
    assert pytest.approx(0.35667494) == HARD


@pytest.mark.parametrize(
    "n_min,wanted",
    [
        (0, (2.0 + 1.0 + 0.4) / 3),  # the largest is above the threshold: all above it
        (1, (2.0 + 1.0 + 0.4) / 3),
        (2, (2.0 + 1.0 + 0.4) / 3),  # index 2 is .4, still above
        (3, (2.0 + 1.0 + 0.4) / 3),  # index 3 is .1, below: the three largest
        (4, (2.0 + 1.0 + 0.4 + 0.1) / 4),  # as many as there are
        (9, (2.0 + 1.0 + 0.4 + 0.1) / 4),  # more than there are
    ],
)
def test_the_hard_ones_of_four_pixels(n_min: int, wanted: float) -> None:
    assert float(ohem(torch.tensor([0.4, 2.0, 0.1, 1.0]), n_min)) == pytest.approx(wanted)


def test_easy_pixels_leave_the_n_min_hardest() -> None:
    losses = torch.tensor([0.3, 0.1, 0.2, 0.05])
    assert float(ohem(losses, 2)) == pytest.approx(0.25)
    assert float(ohem(losses, 0)) == pytest.approx(0.3)  # never the mean of nothing


def test_n_min_is_a_sixteenth_of_the_pixels_and_ignored_ones_are_in_no_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=draw) * 0.01
    labels = torch.randint(0, 3, (2, 8, 8), generator=draw)
    labels[:, :2] = IGNORED
    each = functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")[labels != IGNORED]
    assert float(each.min()) > HARD  # all are hard: all count
    assert float(ohem_loss(logits, labels)) == pytest.approx(float(each.mean()), rel=1e-6)
    sure = torch.full((2, 3, 8, 8), -9.0).scatter_(1, labels.clamp(min=0).unsqueeze(1), 9.0)
    sure[0, :, 7, 7] = 0
    easy = functional.cross_entropy(sure, labels.clamp(min=0), reduction="none")[labels != IGNORED].sort(
        descending=True
    )
    assert float(ohem_loss(sure, labels)) == pytest.approx(float(easy.values[: 2 * 64 // 16].mean()), rel=1e-5)
    with pytest.raises(ValueError, match="no pixel of 2 label maps has a class"):
        ohem_loss(logits, torch.full_like(labels, IGNORED))


def test_logits_are_compared_in_the_size_of_the_labels() -> None:
    small = torch.arange(4.0).reshape(1, 1, 2, 2)
    wide = at_labels(small, torch.zeros(1, 4, 4, dtype=torch.long))
    assert wide.shape == (1, 1, 4, 4) and wide[0, 0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1])
    with pytest.raises(ValueError, match="wanted logits"):
        at_labels(small, torch.zeros(2, 4, 4, dtype=torch.long))


def test_intersection_over_union_by_hand() -> None:
    """Of nine pixels one is passed over; class 0: 3 right, one of it given 1; class 1: 3 right, one of it given 0."""
    labels = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 1, IGNORED]])
    found = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0]])
    counted = confusion(found, labels, 3)
    assert counted.tolist() == [[3, 1, 0], [1, 3, 0], [0, 0, 0]]
    shares = intersection_over_union(counted).tolist()
    assert shares[:2] == pytest.approx([3 / 5, 3 / 5]) and math.isnan(shares[2])


def test_a_set_has_one_matrix_and_not_a_mean_of_pictures() -> None:
    maps = [(torch.tensor([0, 0]), torch.tensor([0, 0])), (torch.tensor([0, 1]), torch.tensor([1, 1]))]
    counted = sum((confusion(found, labels, 2) for found, labels in maps), torch.zeros(2, 2, dtype=torch.long))
    assert intersection_over_union(counted).tolist() == pytest.approx([2 / 3, 1 / 2])
