"""Stages that know nothing of experts, on mixtures of experts: depth by influence, rounding, and what refuses.

Oracles: a mixture or a layer that adds nothing is dropped first and for nothing; a rounded matrix is what the same
rounding makes of it alone.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from compresso.core.axis import Kind
from compresso.core.rounding import fit
from compresso.errors import RecipeError
from compresso.methods.drop_layers import DropLayers
from compresso.methods.repair import Repair
from compresso.methods.rtn import Rtn
from compresso.methods.smoothquant import SmoothQuant
from compresso.sweep.targets import Where
from tests.methods.conftest import MakeJob
from tests.methods.test_drop_experts import LOOKS, logits, prepared, small


def quiet_(layer: nn.Module, *parts: str) -> None:
    """Let a layer's parts add nothing."""
    with torch.no_grad():
        for part in parts:
            layer.get_parameter(part).zero_()


def test_a_mixture_that_adds_nothing_leaves_first(make_job: MakeJob) -> None:
    job = prepared(make_job(), small(layers=6))
    quiet_(job.model.model.layers[3], "mlp.experts.down_proj")
    before = logits(job.model)
    done = DropLayers(kinds=(Kind.MLP,), drop=1, **LOOKS)(job)
    assert done.plan.kept["mlp"] == (0, 1, 2, 4, 5)
    assert done.records["drop_layers"]["scores"]["mlp"][3] == pytest.approx(0, abs=1e-12)
    assert (logits(done.model) - before).abs().max() < 1e-5
    assert "model.layers.3.post_attention_layernorm.weight" not in dict(done.model.named_parameters())


@pytest.mark.parametrize(("score", "alone"), [("influence", (4,)), ("angular", (2, 3))])
def test_layers_that_add_nothing_leave_first(make_job: MakeJob, score: str, alone: tuple[int, ...]) -> None:
    """One of them one by one; two side by side as a run of two, which a run of three would not find."""
    job = prepared(make_job(), small(layers=6))
    for layer in alone:
        quiet_(job.model.model.layers[layer], "mlp.experts.down_proj", "self_attn.o_proj.weight")
    before = logits(job.model)
    knobs: dict[str, Any] = {"score": score, "drop": len(alone), **LOOKS}
    done = DropLayers(**knobs)(job)
    assert done.plan.kept["layers"] == tuple(i for i in range(6) if i not in alone)
    assert (logits(done.model) - before).abs().max() < 1e-5


def test_every_expert_is_rounded_and_no_router(make_job: MakeJob) -> None:
    job = prepared(make_job())
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    done = Rtn(bits=4, group=8)(job)
    after = done.model.state_dict()
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.0.mlp.gate.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name])
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        for expert in (0, 7):
            alone = before[name][expert]
            assert torch.equal(after[name][expert], fit(alone, 4, group=8, symmetric=False, clip=False).round(alone))
        assert name in done.records["rtn"]["zeros"]
    assert not done.records["rtn"]["meant_but_unchanged"] and done.records["rtn"]["changed"] == 2 * 6


def test_what_needs_single_linears_says_so_of_experts(make_job: MakeJob) -> None:
    job = prepared(make_job())
    stage = SmoothQuant()
    with pytest.raises(
        RecipeError,
        match=r"experts.gate_up_proj.0 is one of a stack .* gptq or awq .* where.ignore: \['\*.experts.\*'\]",
    ):
        stage.check(job.model, job.arch)
    names = [
        n
        for here in replace(stage, where=Where(ignore=("*.experts.*",))).check(job.model, job.arch).values()
        for n in here
    ]
    assert len(names) == 4  # q, k and v, and o, of two layers


def test_a_repair_is_refused_before_weights_are_read(make_job: MakeJob) -> None:
    job = prepared(make_job())
    with pytest.raises(
        RecipeError,
        match=r"repair fits single linears .* experts of this model are stacked. Take another.*without its repair",
    ):
        Repair().check(job.model, job.arch)
