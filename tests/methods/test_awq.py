"""AWQ on whole models: nothing but rounding changes, outliers are kept, groups stay on grids. The arithmetic is tested
in tests/core.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compresso.core.rounding import fit
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.methods.awq import Awq
from compresso.methods.rtn import Rtn
from compresso.observe.folds import Stats
from compresso.sweep.targets import Where
from tests.methods.conftest import MakeJob

CONTRACT = {"group": 16}
"""For the contract of stages: the tiny model's widths are multiples of 16."""

NORM = "model.layers.{}.input_layernorm.weight"


def outlying(job: Job) -> Job:
    """The job with a dimension of each attention's input 100 times as large as the others."""
    with torch.no_grad():
        for layer in range(3):
            job.model.get_parameter(NORM.format(layer))[3] *= 100
            for name in ("q_proj", "k_proj", "v_proj"):
                job.model.get_parameter(f"model.layers.{layer}.self_attn.{name}.weight")[:, 3] /= 20
    return job


def lost(dense: Job, other: Job) -> float:
    ids = torch.tensor([row["input_ids"] for row in dense.rows])
    with torch.no_grad():
        p, q = (F.log_softmax(job.model(input_ids=ids).logits, dim=-1) for job in (dense, other))
    return float(F.kl_div(q, p, log_target=True, reduction="sum") / ids.numel())


@pytest.mark.parametrize("knobs", [{}, {"by_weight": True}, {"symmetric": True}, {"clip": False}])
def test_an_outlier_costs_half_of_what_it_costs_rounding_to_nearest(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    dense = outlying(make_job())
    plain = Rtn(bits=4, group=16, symmetric=knobs.get("symmetric", False))(outlying(make_job()))
    job = Awq(bits=4, group=16, **knobs)(outlying(make_job(folder="awq")))
    assert lost(dense, job) < lost(dense, plain) / 2
    facts = job.records["awq"]
    assert all(share <= 1 for share in facts["error_of_unscaled"].values())
    assert facts["bits"] == 4 + (16 + (0 if knobs.get("symmetric") else 4)) / 16
    assert facts["not_scaled"] == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(3)
    ]  # a value head serves several query heads


def test_without_rounding_the_model_computes_what_it_did(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Awq, "_round", lambda self, name, weight, seen, scale: weight)
    dense = outlying(make_job())
    job = Awq(group=16)(outlying(make_job(folder="awq")))
    ids = torch.tensor([row["input_ids"] for row in dense.rows])
    with torch.no_grad():
        torch.testing.assert_close(
            job.model(input_ids=ids).logits, dense.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
    assert not torch.allclose(job.model.get_parameter(NORM.format(0)), dense.model.get_parameter(NORM.format(0)))


def test_groups_have_as_many_values_as_codes_and_untouched_tensors_stay(make_job: MakeJob) -> None:
    dense = make_job().model.state_dict()
    job = Awq(bits=3, group=16)(make_job())
    for name, tensor in job.model.state_dict().items():
        if name.endswith("proj.weight"):
            assert all(len(group.unique()) <= 8 for group in tensor.reshape(-1, 16))
        elif "layernorm" not in name:
            assert torch.equal(tensor, dense[name])


def test_part_of_a_group_is_rounded_without_a_scale(make_job: MakeJob) -> None:
    dense = make_job().model.state_dict()
    job = Awq(group=16, clip=False, where=Where(layers=(0, 1), modules=("*.q_proj", "*.k_proj")))(make_job())
    facts = job.records["awq"]
    assert facts["exponents"] == {} and facts["not_scaled"] == [
        f"model.layers.0.self_attn.{name}_proj" for name in "qk"
    ]
    assert torch.equal(job.model.get_parameter(NORM.format(0)), dense[NORM.format(0)])


def test_what_does_not_fit_is_refused(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(RecipeError, match=r"q_proj has 32 inputs, no multiple of 24"):
        Awq(group=24).check(job.model, job.arch)


def test_equal_inputs_and_weights_need_no_scale() -> None:
    weight = torch.ones(4, 32)
    scale, facts = Awq(group=16)._search(weight, Stats(torch.cat([torch.eye(32), torch.ones(1, 32)]), 1))  # type: ignore[attr-defined]
    assert facts["exponent"] is None and facts["error_of_unscaled"] == 1.0 and torch.equal(scale, torch.ones(32))


def test_ranges_are_clamped_for_the_inputs_as_the_scaled_weights_meet_them() -> None:
    """Oracle: of ten limits, each row and group takes the one whose outputs on x / s are nearest, token by token."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 32, generator=generator, dtype=torch.float64) @ torch.randn(
        32, 32, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(8, 32, generator=generator, dtype=torch.float64)
    scale = torch.randn(32, generator=generator, dtype=torch.float64).exp()
    seen = Stats(torch.cat([inputs.T @ inputs, inputs.abs().sum(dim=0, keepdim=True)]), len(inputs))
    stage = Awq(bits=3, group=16)
    found = stage._round("model.layers.0.mlp.up_proj", weight * scale, seen, scale)  # type: ignore[attr-defined]

    def nearest(met: Tensor) -> Tensor:
        wanted = torch.zeros_like(weight)
        for row, at in product(range(8), (0, 16)):
            part, own = (weight * scale)[row : row + 1, at : at + 16], met[:, at : at + 16]
            limits = [float(part.abs().max()) * (1 - step / 20) for step in range(10)]
            tried = [fit(part.clamp(-limit, limit), 3, group=16).round(part.clamp(-limit, limit)) for limit in limits]
            errors = [float((own @ (one - part).T).square().sum()) for one in tried]
            wanted[row, at : at + 16] = tried[errors.index(min(errors))]
        return wanted

    torch.testing.assert_close(found, nearest(inputs / scale))
    assert not torch.allclose(found, nearest(inputs))  # the inputs before scaling ask for other limits


def test_scales_come_from_activations_alone_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger weights of an input change the scales of AutoAWQ alone."""
    monkeypatch.setattr(
        "compresso.methods.awq.best_scale", lambda weight, moment, tried, _: (*list(tried)[-1], 0.0, 1.0)
    )
    seen = Stats(torch.cat([torch.eye(16), torch.linspace(0.5, 2, 16).unsqueeze(0)]), 1)

    def scale(stage: Awq, times: float) -> Tensor:
        weight = torch.linspace(0.1, 1, 64).reshape(4, 16)
        return stage._search(weight * torch.where(torch.arange(16) == 3, times, 1.0), seen)[0]

    assert torch.equal(scale(Awq(group=16, steps=4), 1), scale(Awq(group=16, steps=4), 5))
    of_both = Awq(group=16, steps=4, by_weight=True)
    assert not torch.allclose(scale(of_both, 1), scale(of_both, 5))
