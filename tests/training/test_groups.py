"""Parameter groups against torch's own optimizers and hand-made arithmetic."""

import pytest
import torch
from torch import nn

from compresso.errors import CompressoError
from compresso.training.groups import Group, adamw, all_finite, check_groups, clip_, gradient_norms, set_rates_


def parameters(*sizes: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in sizes]


def gradients(params: list[nn.Parameter], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) * 3 for p in params]


def test_ascent_is_adamw_on_the_negated_gradient_by_hand():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = adamw([Group("up", [p], lr=0.1, ascend=True)])
    m = v = torch.zeros(2)
    wanted = p.detach().clone()
    for t, g in enumerate([torch.tensor([0.5, -1.0]), torch.tensor([-0.25, 2.0])], start=1):
        p.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        wanted = wanted + 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-6)
    assert p[0] > 1.0


def test_three_groups_are_three_optimizers():
    """Rates, schedule, direction, betas and decay of one group do not leak into another."""
    ours, theirs = parameters(3, 4, 2), parameters(3, 4, 2)
    groups = [
        Group("lora", ours[:1], lr=0.01, schedule=lambda u: 1 - u / 10, weight_decay=0.1),
        Group("gates", ours[1:2], lr=0.1),
        Group("lambdas", ours[2:], lr=0.2, ascend=True, betas=(0.8, 0.99)),
    ]
    optimizer = adamw(groups)
    separate = [
        torch.optim.AdamW(theirs[:1], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(theirs[1:2], lr=0.1, weight_decay=0.0),
        torch.optim.AdamW(theirs[2:], lr=0.2, weight_decay=0.0, betas=(0.8, 0.99), maximize=True),
    ]
    for update in range(6):
        for mine, other, g in zip(ours, theirs, gradients(ours, update), strict=True):
            mine.grad, other.grad = g.clone(), g.clone()
        if update < 2:  # the gates join later; their bias correction starts then
            ours[1].grad = theirs[1].grad = None
        set_rates_(optimizer, groups, update)
        separate[0].param_groups[0]["lr"] = 0.01 * (1 - update / 10)
        optimizer.step()
        for one in separate:
            one.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    assert optimizer.state[ours[1]]["step"] == 4


def test_a_clip_touches_its_own_group_only():
    params = parameters(3, 3)
    groups = [Group("clipped", params[:1], lr=1.0, clip=1.0), Group("free", params[1:], lr=1.0)]
    optimizer = adamw(groups)
    params[0].grad, params[1].grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([30.0, 40.0, 0.0])
    norms = gradient_norms(optimizer)
    assert [float(n) for n in norms if n is not None] == [5.0, 50.0]
    clip_(optimizer, groups, norms)
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8, 0.0]), rtol=1e-5, atol=0)
    assert torch.equal(params[1].grad, torch.tensor([30.0, 40.0, 0.0]))


def test_a_small_gradient_is_not_scaled_up():
    params = parameters(2)
    groups = [Group("clipped", params, lr=1.0, clip=10.0)]
    optimizer = adamw(groups)
    params[0].grad = torch.tensor([3.0, 4.0])
    clip_(optimizer, groups, gradient_norms(optimizer))
    assert torch.equal(params[0].grad, torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norms_show_what_is_not_finite(value: float):
    params = parameters(2, 2, 2)
    optimizer = adamw([Group(str(i), [p], lr=1.0) for i, p in enumerate(params)])
    assert all_finite(gradient_norms(optimizer))  # no gradients at all
    params[1].grad = torch.ones(2)
    assert all_finite(gradient_norms(optimizer))
    params[2].grad = torch.tensor([1.0, value])
    assert not all_finite(gradient_norms(optimizer))


def test_groups_must_cover_the_trainable_parameters_exactly():
    a, b, foreign = parameters(1, 2, 3)
    named = {"a": a, "b": b}
    check_groups([Group("one", [a], lr=0.0), Group("two", [b], lr=1.0)], named)
    with pytest.raises(CompressoError, match="1 trainable parameters are in no group, the first is b"):
        check_groups([Group("one", [a], lr=1.0)], named)
    with pytest.raises(CompressoError, match="parameter a is in the groups 'one' and 'two'"):
        check_groups([Group("one", [a, b], lr=1.0), Group("two", [a], lr=1.0)], named)
    with pytest.raises(
        CompressoError, match=r"group 'one' holds a parameter of shape \(3,\) that is not a trainable parameter"
    ):
        check_groups([Group("one", [a, b, foreign], lr=1.0)], named)
    with pytest.raises(CompressoError, match=r"lr=-0.1, wanted >= 0; for gradient ascent set ascend=True"):
        check_groups([Group("one", [a, b], lr=-0.1)], named)
