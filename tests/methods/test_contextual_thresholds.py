"""The published procedure: planted dead neurons, unseen tokens, masked gradients, thresholds of 0."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compresso.job import Job
from compresso.methods.contextual_thresholds import ContextualThresholds, linear_masks, with_tokens_zeroed, zero_
from compresso.metrics.held import held_loss
from compresso.observe.linear_uses import linear_uses
from tests.methods.conftest import MakeJob
from tests.methods.test_contextual import biased

CONTRACT = {"windows": 8}
"""For the contract of stages: its data has fewer than 40 examples."""

QUICK = {"steps": 1, "batch": 4, "micro_batch": 4, "windows": 36}
MLP = "model.layers.1.mlp"


@torch.no_grad()
def with_dead_neuron(job: Job) -> Job:
    """Neuron 5 of layer 1: its gate lies far below 0 on all text, so that ReLU gives 0."""
    job = biased(job)
    job.model.get_parameter(f"{MLP}.gate_proj.bias")[5] = -100.0
    return job


def logits(job: Job) -> Tensor:
    with torch.no_grad():
        return job.model(job.collated(job.rows)["input_ids"]).logits


def test_a_dead_neuron_is_zeroed_and_nothing_else_changes(make_job: MakeJob) -> None:
    job = with_dead_neuron(make_job())
    before, held = logits(job), held_loss(job.model, job.rows).mean
    after = ContextualThresholds(linear=0, activation=0, lr=0, **QUICK)(job)  # type: ignore[arg-type]
    assert not after.model.get_parameter(f"{MLP}.gate_proj.weight")[5].any()
    assert after.model.get_parameter(f"{MLP}.gate_proj.bias")[5] == 0
    assert not after.model.get_parameter(f"{MLP}.down_proj.weight")[:, 5].any()
    assert (logits(after) - before).abs().max() < 1e-6
    assert held_loss(after.model, after.rows).mean == pytest.approx(held, abs=1e-7)
    zeroed = after.records["contextual_thresholds"]["zeroed_tensors"]
    dead_elsewhere = sum(n for name, n in zeroed.items() if not name.startswith(MLP))
    assert zeroed[f"{MLP}.gate_proj.weight"] >= 32 and zeroed[f"{MLP}.gate_proj.bias"] >= 1 and dead_elsewhere >= 0


def test_a_constant_output_keeps_its_bias_alone(make_job: MakeJob) -> None:
    job = biased(make_job())
    with torch.no_grad():
        job.model.get_parameter(f"{MLP}.up_proj.weight")[3] *= 1e-6
    before, bias = logits(job), job.model.get_parameter(f"{MLP}.up_proj.bias")[3].item()
    after = ContextualThresholds(linear=1e-4, activation=None, lr=0, **QUICK)(job)  # type: ignore[arg-type]
    assert not after.model.get_parameter(f"{MLP}.up_proj.weight")[3].any()
    assert after.model.get_parameter(f"{MLP}.up_proj.bias")[3].item() == bias != 0
    assert (logits(after) - before).abs().max() < 1e-3


def test_unseen_tokens_are_zeroed_but_not_special_ones(make_job: MakeJob) -> None:
    job = make_job(tied=False)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in job.rows if max(row["input_ids"]) < 40]
    job = replace(job, rows=rows)
    seen = {i for row in rows for i in row["input_ids"]}
    before = {name: parameter.clone() for name, parameter in job.model.named_parameters()}
    after = ContextualThresholds(linear=None, activation=None, embedding=0, lr=0, **QUICK)(job)  # type: ignore[arg-type]
    special = {0, 1, 2}  # padding, beginning and end of the config
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found = after.model.get_parameter(name)
        stays = [bool(found[i].any()) for i in range(64)]
        assert stays == [i in seen | special for i in range(64)]
        assert torch.equal(found[sorted(seen)], before[name][sorted(seen)])
    assert all(
        torch.equal(after.model.get_parameter(name), value) for name, value in before.items() if ".layers." in name
    )


def test_zeros_stay_zero_through_training_and_others_move(make_job: MakeJob) -> None:
    job = with_dead_neuron(make_job())
    uses = linear_uses(job.model, [job.collated(job.rows)])
    masks = linear_masks(job.model, uses, 0.05, 0.05)
    n_zeroed = sum(int((~stays).sum()) for stays in masks.values())
    knobs = {**QUICK, "steps": 10}
    after = ContextualThresholds(linear=0.05, activation=0.05, lr=1e-2, **knobs)(job)  # type: ignore[arg-type]
    assert n_zeroed > 40
    for name, stays in masks.items():
        assert not after.model.get_parameter(name)[~stays].any(), name
    assert sum(after.records["contextual_thresholds"]["zeroed_tensors"].values()) == n_zeroed
    curve = after.records["contextual_thresholds"]["curve"]["loss"]
    assert curve[-1] < curve[0]
    assert after.model.get_parameter(f"{MLP}.gate_proj.weight")[6].any()


def test_a_zeroed_row_that_has_a_gradient_stays_zero(make_job: MakeJob) -> None:
    """Behind a dead ReLU gradients are 0 anyway; a row of `up_proj` learns through the open gate beside it, as its bias
    does.
    """
    job = biased(make_job())
    with torch.no_grad():
        job.model.get_parameter(f"{MLP}.up_proj.weight")[3] *= 1e-6
        job.model.get_parameter(f"{MLP}.gate_proj.bias")[3] = 5.0
    bias = job.model.get_parameter(f"{MLP}.up_proj.bias")[3].item()
    knobs = {**QUICK, "steps": 4}
    after = ContextualThresholds(linear=1e-4, activation=None, lr=1e-2, **knobs)(job)  # type: ignore[arg-type]
    assert abs(after.model.get_parameter(f"{MLP}.up_proj.bias")[3].item() - bias) > 1e-3
    assert not after.model.get_parameter(f"{MLP}.up_proj.weight")[3].any()


def test_more_is_zeroed_as_thresholds_rise(make_job: MakeJob) -> None:
    job = with_dead_neuron(make_job())
    uses = linear_uses(job.model, [job.collated(job.rows)])
    counts = [
        sum(int((~stays).sum()) for stays in linear_masks(job.model, uses, t, t).values()) for t in (0, 0.1, 0.4, 2, 50)
    ]
    assert counts == sorted(counts) and counts[0] < counts[2] < counts[-1]
    assert not linear_masks(job.model, uses, None, None)[f"{MLP}.up_proj.weight"].logical_not().any()


def test_a_tied_head_is_left_to_the_embedding_rule(make_job: MakeJob) -> None:
    job = make_job(tied=True)
    masks = linear_masks(job.model, linear_uses(job.model, [job.collated(job.rows)]), 0.1, 0.1)
    assert "lm_head.weight" not in masks and "model.embed_tokens.weight" not in masks
    stays = torch.ones(64, dtype=torch.bool)
    stays[7] = False
    masks = with_tokens_zeroed(job.model, {}, stays)
    assert list(masks) == ["model.embed_tokens.weight"]
    zero_(job.model, masks)
    assert not job.model.get_parameter("lm_head.weight")[7].any() and job.model.get_parameter("lm_head.weight")[8].any()
