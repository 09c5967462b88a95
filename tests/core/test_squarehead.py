"""SquareHead's loss: closed forms by hand, gradients by differences, blind to padding and to how states are scaled."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from compresso.core.distillation import hidden_distance
from compresso.core.squarehead import EPSILON, Norm, squared_error, squarehead

NORMS: tuple[Norm, ...] = get_args(Norm)
every_norm = pytest.mark.parametrize("norm", NORMS)
RELATIVE = [norm for norm in NORMS if norm != "none"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    """Teacher (1, 2), (4, 4); student 1 off everywhere. Mean squares 1 over 9.25; per token 1 over 2.5 and over 16."""
    teacher = torch.tensor([[1.0, 2.0], [4.0, 4.0]], dtype=torch.float64)
    e = EPSILON
    wanted = {
        "none": 1.0,
        "global": 1 / (9.25 + e),
        "token_l2": (1 / (2.5 + e) + 1 / (16 + e)) / 2,
        "element": (1 / (1 + e) + 1 / (4 + e) + 2 / (16 + e)) / 4,
    }
    for norm in NORMS:
        assert squared_error(teacher + 1, teacher, norm).item() == pytest.approx(wanted[norm], rel=1e-12)


def test_the_published_normalisation_is_global_with_the_epsilon_of_bfloat16() -> None:
    """Student 1.1 x teacher: 0.01 but for the epsilon beside the mean square of 2.5."""
    teacher = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    found = squarehead([1.1 * teacher], [teacher], torch.ones(1, 2, dtype=torch.bool))
    assert found.item() == pytest.approx(0.00996885, rel=1e-6)


@every_norm
def test_layers_are_summed_and_an_equal_costs_nothing(norm: Norm) -> None:
    layers, others = ([drawn(2, 3, 4, seed=seed) for seed in seeds] for seeds in ((1, 2, 3), (4, 5, 6)))
    counted = torch.ones(2, 3, dtype=torch.bool)
    assert squarehead(layers, layers, counted, norm).item() == 0
    each = [squarehead([one], [other], counted, norm) for one, other in zip(layers, others, strict=True)]
    torch.testing.assert_close(squarehead(layers, others, counted, norm), torch.stack(each).sum())


@every_norm
def test_padding_counts_nowhere(norm: Norm) -> None:
    """What stands at padding, on either side, changes neither value nor gradient; it gets none."""
    ours, theirs = drawn(2, 5, 4), drawn(2, 5, 4, seed=1)
    counted = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    found: list[tuple[Tensor, Tensor]] = []
    for fill in (0.0, 1e6, float("nan")):
        student = ours.masked_fill(~counted.unsqueeze(-1), fill).requires_grad_()
        teacher = theirs.masked_fill(~counted.unsqueeze(-1), -fill)
        loss = squarehead([student], [teacher], counted, norm)
        loss.backward()
        assert student.grad is not None
        assert student.grad[~counted].abs().max() == 0
        found.append((loss.detach(), student.grad))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


@every_norm
def test_gradients_are_finite_differences_and_the_teacher_gets_none(norm: Norm) -> None:
    student, teacher = drawn(2, 3, 4).requires_grad_(), drawn(2, 3, 4, seed=1)
    counted = torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    assert torch.autograd.gradcheck(lambda states: squarehead([states], [teacher], counted, norm), (student,))
    teaching = teacher.clone().requires_grad_()
    squarehead([student], [teaching], counted, norm).backward()
    assert teaching.grad is None


@pytest.mark.parametrize("norm", RELATIVE)
def test_relative_losses_do_not_hear_how_large_a_layer_s_states_are(norm: Norm) -> None:
    ours, theirs = 1e3 * drawn(6, 4), 1e3 * drawn(6, 4, seed=1)
    large, larger = (squared_error(k * ours, k * theirs, norm).item() for k in (1.0, 1e3))
    assert larger == pytest.approx(large, rel=1e-2)
    assert squared_error(1e3 * ours, 1e3 * theirs, "none").item() == pytest.approx(
        1e6 * squared_error(ours, theirs, "none").item()
    )


def test_one_massive_token_drowns_the_others_globally_and_counts_once_by_token() -> None:
    theirs = drawn(100, 8)
    theirs[0] *= 1e3
    ours = theirs.clone()
    ours[1:] *= 1.5  # all but the massive one are wrong by half
    assert squared_error(ours, theirs, "global") < 1e-4
    assert squared_error(ours, theirs, "token_l2").item() == pytest.approx(0.25, rel=0.05)


@every_norm
def test_half_precision_is_widened_before_anything_is_squared(norm: Norm) -> None:
    ours, theirs = (300 * drawn(7, 5)).half(), (300 * drawn(7, 5, seed=1)).half()
    found = squared_error(ours, theirs, norm)
    assert found.dtype == torch.float32
    assert torch.equal(found, squared_error(ours.float(), theirs.float(), norm))
    assert found.isfinite()  # 300 squared is beyond float16


def test_what_cannot_be_compared_is_refused() -> None:
    states, counted = drawn(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="1 layers of the student and 2 of the teacher"):
        squarehead([states], [states, states], counted)
    with pytest.raises(ValueError, match="0 layers"):
        squarehead([], [], counted)
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 2\]"):
        squarehead([states], [states[..., :2]], counted)
    with pytest.raises(ValueError, match="0 tokens"):
        squarehead([states], [states], ~counted)


def test_distillation_s_mse_is_the_plain_one() -> None:
    ours, theirs = drawn(9, 4).float(), drawn(9, 4, seed=1).float()
    assert torch.equal(hidden_distance(ours, theirs, "mse"), (ours - theirs).square().mean())
    assert torch.equal(hidden_distance(ours, theirs, "mse"), squared_error(ours, theirs, "none"))
