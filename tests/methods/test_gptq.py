"""GPTQ and rounding to nearest on whole models. The arithmetic of both is tested in tests/core."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compresso.errors import RecipeError
from compresso.methods.gptq import Gptq
from compresso.methods.rtn import Rtn
from compresso.observe.folds import Stats
from compresso.sweep.one_shot import compensated
from compresso.sweep.targets import Group
from tests.methods.conftest import MakeJob
from tests.methods.test_sparsegpt import divergence, noisy


@pytest.mark.parametrize(
    "knobs",
    [{}, {"group": 16}, {"act_order": True}, {"group": 16, "act_order": True}, {"symmetric": True, "clip": True}],
)
def test_every_row_and_group_has_at_most_so_many_values(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    job = Gptq(bits=3, **knobs)(make_job())
    for name in job.records["gptq"]["zeros"]:
        weight = job.model.get_parameter(name).detach()
        for group in weight.reshape(-1, knobs.get("group") or weight.shape[1]):
            values = group.unique()
            assert len(values) <= 8
            if len(values) > 1:  # multiples of one step
                steps = (values - values[0]) / values.diff().min()
                assert float((steps - steps.round()).abs().max()) < 0.05


def test_less_is_lost_than_by_rounding_to_nearest(make_job: MakeJob) -> None:
    plain = clever = ordered = 0.0
    for seed in range(4):
        dense = noisy(make_job(), seed)
        plain += divergence(dense, Rtn(bits=3)(noisy(make_job(), seed)))
        clever += divergence(dense, Gptq(bits=3)(noisy(make_job(folder=f"g{seed}"), seed)))
        ordered += divergence(dense, Gptq(bits=3, act_order=True)(noisy(make_job(folder=f"o{seed}"), seed)))
    assert 0 < clever < plain
    assert 0 < ordered < plain


def test_with_uncorrelated_inputs_it_is_rounding_to_nearest(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import compresso.methods.gptq as module

    monkeypatch.setattr(module, "second_moment", lambda total, inputs: torch.eye(inputs.shape[1]) * 3)
    wanted = Rtn(bits=4, group=8)(make_job()).model.state_dict()
    for knobs in ({}, {"act_order": True}):
        job = Gptq(bits=4, group=8, **knobs)(make_job(folder=str(knobs)))  # type: ignore[arg-type]
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in job.model.state_dict().items())


def test_groups_that_do_not_fit_are_refused(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(RecipeError, match=r"q_proj has 32 inputs, no multiple of 24"):
        Gptq(group=24, block=24).check(job.model, job.arch)
    with pytest.raises(ValidationError, match="cuts groups of 24"):
        Gptq(group=24, block=32)
    with pytest.raises(ValidationError):
        Gptq(bits=9)


def test_a_group_gets_its_grid_when_the_sweep_reaches_it() -> None:
    """Oracle: GPTQ one column at a time, each group's range taken from the weights that earlier errors have already
    moved.
    """
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(40, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    linear = nn.Linear(12, 6, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randn(6, 12, generator=generator))
    dense = linear.weight.double()
    moment = 2 / 40 * inputs.double().T @ inputs.double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).T
    now, scale, zero = dense.clone(), torch.ones(6), torch.zeros(6)
    for j in range(12):
        if j % 4 == 0:
            low, high = now[:, j : j + 4].amin(dim=1).clamp(max=0), now[:, j : j + 4].amax(dim=1).clamp(min=0)
            scale, zero = (high - low) / 7, torch.round(-low / ((high - low) / 7))
        rounded = scale * ((torch.round(now[:, j] / scale) + zero).clamp(0, 7) - zero)
        error = (now[:, j] - rounded) / upper[j, j]
        now[:, j:] -= error[:, None] * upper[j, j:]
        now[:, j] = rounded
    model = nn.ModuleDict({"only": linear})
    edit = compensated(model, quantize=Gptq(bits=3, group=4)._rounding, block=8)
    edit(Group(0, ("only",)), Stats(inputs.T @ inputs, 40))
    torch.testing.assert_close(linear.weight.double(), now, atol=1e-4, rtol=1e-4)
