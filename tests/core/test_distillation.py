"""Divergences against closed forms and finite differences; in pieces as in one piece;
nothing to learn from an equal.
"""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from compresso.core.distillation import Divergence, chunked, divergences, dynamic_scale, hidden_distance

KINDS: tuple[Divergence, ...] = get_args(Divergence)
every_kind = pytest.mark.parametrize("kind", KINDS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two_tokens(p: float) -> Tensor:
    """Logits [1, 2] of the distribution (p, 1 - p)."""
    return torch.tensor([[math.log(p), math.log1p(-p)]], dtype=torch.float64)


def binary_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_closed_forms_on_two_tokens() -> None:
    teacher, student = 0.9, 0.3
    mixture = 0.2 * teacher + 0.8 * student
    wanted = {
        "forward": binary_kl(teacher, student),
        "reverse": binary_kl(student, teacher),
        "js": 0.2 * binary_kl(teacher, mixture) + 0.8 * binary_kl(student, mixture),
    }
    for kind in KINDS:
        assert divergences(two_tokens(student), two_tokens(teacher), kind, beta=0.2).item() == pytest.approx(
            wanted[kind], rel=1e-12
        )


@every_kind
def test_a_model_has_nothing_to_learn_from_itself(kind: Divergence) -> None:
    logits = drawn(5, 7).requires_grad_()
    found = divergences(logits, logits.detach(), kind, temperature=2.0)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


@every_kind
def test_divergences_are_positive_and_blind_to_a_shift_of_logits(kind: Divergence) -> None:
    student, teacher = drawn(50, 7), drawn(50, 7, seed=1)
    found = divergences(student, teacher, kind)
    assert (found > 0).all()
    torch.testing.assert_close(divergences(student + 3, teacher - 5, kind), found)


@every_kind
def test_gradients_are_finite_differences(kind: Divergence) -> None:
    teacher = drawn(3, 5, seed=1)
    student = drawn(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: divergences(logits, teacher, kind, 1.7, 0.3), (student,))


@every_kind
def test_the_temperature_keeps_gradients_at_their_size(kind: Divergence) -> None:
    """T^2 KL at temperature T is the same function of logits / T as KL; the gradient of hot ones tends to (student -
    teacher) / vocab.
    """
    student, teacher = drawn(4, 6).requires_grad_(), drawn(4, 6, seed=1)
    hot = divergences(student, teacher, kind, temperature=3.0)
    torch.testing.assert_close(hot, 9 * divergences(student / 3, teacher / 3, kind))
    (gradient,) = torch.autograd.grad(divergences(student, teacher, kind, temperature=1e4).sum(), student)
    gap = student - teacher
    share = 0.25 if kind == "js" else 1.0  # beta (1 - beta) of the KL, to second order
    torch.testing.assert_close(gradient, share * (gap - gap.mean(-1, keepdim=True)).detach() / 6, rtol=2e-3, atol=1e-5)


def test_jensen_shannon_is_symmetric_in_the_middle_and_bounded() -> None:
    a, b = drawn(20, 6), 10 * drawn(20, 6, seed=1)
    there, back = divergences(a, b, "js", beta=0.5), divergences(b, a, "js", beta=0.5)
    torch.testing.assert_close(there, back)
    assert (there <= math.log(2)).all()
    assert not torch.allclose(divergences(a, b, "js", beta=0.1), divergences(b, a, "js", beta=0.1))


def test_half_precision_logits_are_widened() -> None:
    student, teacher = drawn(4, 6).bfloat16(), drawn(4, 6, seed=1).bfloat16()
    found = divergences(student, teacher, "forward")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, divergences(student.float(), teacher.float(), "forward"))


@pytest.mark.parametrize("chunk", [1, 3, 10, 99])
@pytest.mark.parametrize("trains_head", [True, False])
def test_in_pieces_as_in_one(chunk: int, trains_head: bool) -> None:
    """Value and gradients of hidden states and head equal those of plain autograd over all tokens."""
    teacher = drawn(10, 6, seed=2)
    results: list[list[Tensor]] = []
    for pieces in (False, True):
        hidden = drawn(10, 4).requires_grad_()
        head = drawn(6, 4, seed=1).requires_grad_(trains_head)

        def loss(rows: slice, part: Tensor, head: Tensor = head) -> tuple[Tensor, Tensor]:
            each = divergences(part @ head.T, teacher[rows], "forward")
            return each.sum(), torch.stack([each.sum().detach(), each.square().sum().detach()])

        value, facts = chunked(loss, hidden, [head], chunk) if pieces else loss(slice(0, 10), hidden)
        (3 * value + hidden.square().sum()).backward()
        assert not facts.requires_grad
        assert hidden.grad is not None
        results.append([value.detach(), facts, hidden.grad, *([head.grad] if head.grad is not None else [])])
    assert len(results[0]) == len(results[1]) == 3 + trains_head
    for plain, pieced in zip(*results, strict=True):
        torch.testing.assert_close(pieced, plain)


def test_no_more_than_a_piece_is_ever_seen() -> None:
    seen: list[tuple[slice, int]] = []

    def loss(rows: slice, part: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((rows, part.shape[0]))
        return part.sum(), torch.zeros(1)

    hidden = torch.ones(7, 2, requires_grad=True)
    chunked(loss, hidden, [], 3)[0].backward()
    assert seen == [(slice(0, 3), 3), (slice(3, 6), 3), (slice(6, 7), 1)]  # and not again in the backward pass
    with torch.no_grad():
        assert chunked(loss, hidden, [], 4)[0].item() == 14


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_distances_of_hidden_states(kind: str) -> None:
    ours, theirs = drawn(4, 6).requires_grad_(), drawn(4, 6, seed=1)
    assert hidden_distance(ours, ours.detach(), kind).item() == pytest.approx(0, abs=1e-12)  # type: ignore[arg-type]
    doubled = hidden_distance(2 * theirs, theirs, kind).item()  # type: ignore[arg-type]
    assert doubled == pytest.approx(theirs.square().mean().item() if kind == "mse" else 0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda states: hidden_distance(states, theirs, kind), (ours,))  # type: ignore[arg-type]
    assert hidden_distance(-theirs, theirs, "cosine").item() == pytest.approx(2)


def test_the_dynamic_scale_carries_no_gradient_and_survives_zero() -> None:
    main, auxiliary = torch.tensor(6.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    scale = dynamic_scale(main, auxiliary)
    assert scale.item() == 3 and not scale.requires_grad
    to_main, to_auxiliary = torch.autograd.grad(main + scale * auxiliary, [main, auxiliary])
    assert (to_main.item(), to_auxiliary.item()) == (1, 3)
    assert dynamic_scale(main, torch.tensor(0.0)).item() == 0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 4\]"):
        divergences(torch.zeros(2, 3), torch.zeros(2, 4), "forward")
    with pytest.raises(ValueError, match="temperature=0"):
        divergences(torch.zeros(2, 3), torch.zeros(2, 3), "forward", temperature=0)
    with pytest.raises(ValueError, match="beta=1"):
        divergences(torch.zeros(2, 3), torch.zeros(2, 3), "js", beta=1)
    with pytest.raises(ValueError, match="0 tokens"):
        chunked(lambda rows, part: (part.sum(), part), torch.zeros(0, 3), [], 4)
    with pytest.raises(ValueError, match="select the remaining dimensions"):
        hidden_distance(torch.zeros(2, 3), torch.zeros(2, 4), "mse")
