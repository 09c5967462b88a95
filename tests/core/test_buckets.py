"""A divergence over a few outcomes and the rest is never more than the one over all, and with all outcomes it is
that.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from compresso.core.buckets import bucket_divergences, bucketed, merged, strongest
from compresso.core.distillation import Divergence, divergences

KINDS: list[Divergence] = ["forward", "reverse", "js"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(seed: int, rows: int = 9, outcomes: int = 40, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, outcomes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_buckets(student: Tensor, teacher: Tensor, n: int, kind: Divergence, temperature: float = 1.0) -> Tensor:
    outcomes, log_probs = strongest(teacher, n, temperature)
    return bucket_divergences(student, outcomes, log_probs, kind, temperature)


@every_kind
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_as_many_buckets_as_outcomes_are_the_whole_loss_and_its_gradient(kind: Divergence, temperature: float) -> None:
    teacher = logits(1)
    found: list[tuple[Tensor, Tensor]] = []
    for loss in (divergences, lambda q, p, *how: of_buckets(q, p, 99, *how)):  # type: ignore[misc]
        student = logits(2).requires_grad_(True)
        each = loss(student, teacher, kind, temperature)  # type: ignore[operator]
        each.sum().backward()
        assert student.grad is not None
        found.append((each.detach(), student.grad))
    torch.testing.assert_close(found[1], found[0])


@every_kind
@pytest.mark.parametrize("n", [1, 5, 39])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_what_is_found_is_a_lower_bound_that_rises_with_what_is_kept(
    kind: Divergence, n: int, temperature: float
) -> None:
    for seed in range(20):
        student, teacher = logits(seed, scale=1.0 + seed / 4), logits(seed + 100)
        full = divergences(student, teacher, kind, temperature)
        found = of_buckets(student, teacher, n, kind, temperature)
        assert (found >= -1e-12).all()
        assert (found <= full + 1e-12).all()
        assert (found <= of_buckets(student, teacher, n + 1, kind, temperature) + 1e-12).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_it_lacks_the_divergence_within_the_rest(temperature: float) -> None:
    """The identity of the header, with the rest picked out by hand."""
    student, teacher = logits(3), logits(4)
    outcomes, log_probs = strongest(teacher, 6, temperature)
    within = torch.ones_like(teacher, dtype=torch.bool).scatter(1, outcomes, value=False)
    rests = [one[within].reshape(len(one), -1) for one in (student, teacher)]
    lacking = log_probs[:, -1].exp() * divergences(*rests, "forward", temperature)
    full = divergences(student, teacher, "forward", temperature)
    found = bucket_divergences(student, outcomes, log_probs, "forward", temperature)
    torch.testing.assert_close(found + lacking, full)


def test_buckets_are_probabilities_and_merging_whole_ones_is_the_same() -> None:
    teacher = logits(5)
    outcomes, log_probs = strongest(teacher, 7, 2.0)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(9, dtype=torch.float64))
    assert (log_probs[:, :-1].diff(dim=-1) <= 0).all()
    everything, whole = strongest(teacher, 40, 2.0)
    assert torch.equal(everything[:, :7], outcomes)
    torch.testing.assert_close(merged(whole, 7), log_probs)
    assert merged(whole, 40) is whole


def test_a_rest_that_rounding_would_lose_has_its_probability_and_a_gradient() -> None:
    """1 - 0.99999999 is 0 in float32."""
    one = torch.tensor([[30.0, 1.0, 0.0]], requires_grad=True)
    rest = bucketed(one, torch.tensor([[0]]))[0, -1]
    torch.testing.assert_close(rest, torch.tensor([1.0, 0.0]).logsumexp(0) - 30)
    (gradient,) = torch.autograd.grad(rest, one)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, *torch.tensor([1.0, 0.0]).softmax(0)]]))


def test_an_equal_student_learns_nothing() -> None:
    teacher = logits(6).float()
    student = teacher.clone().requires_grad_(True)
    loss = of_buckets(student, teacher, 5, "forward").sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(float(loss.detach())) < 1e-5 and float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: strongest(logits(0), 0), "0 outcomes"),
        (lambda: bucketed(logits(0), torch.zeros(9, 1, dtype=torch.int64), 0.0), "temperature=0.0 divides"),
        (lambda: bucket_divergences(logits(0), *strongest(logits(0)[:8], 3), "forward"), "do not belong to logits"),
        (lambda: bucket_divergences(logits(0)[:, :30], *strongest(logits(0), 30), "forward"), r"wanted \[9, 30\]"),
        (lambda: bucket_divergences(logits(0), *strongest(logits(0), 3), "js", beta=1.0), "beta=1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
