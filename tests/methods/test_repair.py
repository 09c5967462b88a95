"""Repair behind every selector, on a tiny model that learned its language: it helps, or it is taken back and said."""

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import compresso.methods.repair as module
from compresso.core.losses import next_token_loss
from compresso.core.plan import Plan
from compresso.errors import CheckpointError, DataError, ResumeError
from compresso.job import Job
from compresso.methods.cut_vocab import CutVocab
from compresso.methods.drop_experts import DropExperts
from compresso.methods.drop_layers import DropLayers
from compresso.methods.magnitude_structured import MagnitudeStructured
from compresso.methods.repair import Repair
from compresso.stage import Card, Effects, cards
from tests.methods.conftest import MakeJob
from tests.methods.test_contract import quick

CONTRACT: dict[str, Any] = {"examples": 36}
"""For the contract of stages: all examples of its job, so that the passes can be counted."""

UNREPAIRED = CutVocab, DropExperts
"""No linear takes up what left: tokens have none behind them, and mixtures of experts are refused."""
SELECTORS = [card for card in cards().values() if Effects.SHAPES in card.effects and card.type not in UNREPAIRED]


_MODELS: dict[str, LlamaForCausalLM] = {}


def learned(job: Job) -> Job:
    """The job with a dense model that learned the job's language."""
    if "dense" not in _MODELS:
        model: Any = copy.deepcopy(job.model).train()
        ids = torch.tensor([row["input_ids"] for row in job.rows])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(80):
            optimizer.zero_grad()
            next_token_loss(model(input_ids=ids).logits, ids).backward()
            optimizer.step()
        _MODELS["dense"] = model.eval().requires_grad_(False)
    dense = _MODELS["dense"]
    return replace(
        job,
        model=copy.deepcopy(dense),
        original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype),
    )


def prepared(job: Job) -> Job:
    """For the contract: a job whose model has lost units, as if its recipe had begun so."""
    smaller = MagnitudeStructured(keep=0.6)(learned(job))
    return replace(smaller, plan=Plan(), records={}, removal=None)


def loss(job: Job) -> float:
    return job.task.score(job.model, job.held).mean


@pytest.mark.slow
@pytest.mark.parametrize("target", ["residual", "input"])
@pytest.mark.parametrize("card", SELECTORS, ids=lambda card: card.name)
def test_behind_every_selector_the_loss_falls_or_nothing_changes(make_job: MakeJob, card: Card, target: str) -> None:
    knobs = quick(card) | ({"keep": 0.6} if "keep" in card.knobs else {})
    knobs |= {"masks": 10} if "masks" in card.knobs else {}
    chosen = card.type(**knobs)(learned(make_job()))
    weights = {name: one.clone() for name, one in chosen.model.state_dict().items()}
    shapes = chosen.arch.shapes(chosen.model)
    repair = Repair(target=target)  # pyright: ignore[reportArgumentType]
    _, judging = repair._rows(chosen)  # what it may not fit to
    before = chosen.task.score(chosen.model, judging).mean
    job = repair(replace(chosen, out=chosen.out / "repair"))
    records = job.records["repair"]
    assert job.arch.shapes(job.model) == shapes
    assert job.plan == chosen.plan
    changed = {name for name, one in job.model.state_dict().items() if not torch.equal(one, weights[name])}
    if records["applied"]:
        assert records["held_out_loss"][1] < records["held_out_loss"][0]
        assert changed and changed <= {f"{name}.weight" for name in records["linears"]}
        after = job.task.score(job.model, judging).mean
        assert after < before and records["held_out_loss"] == pytest.approx([before, after], rel=1e-4)
    else:
        assert changed == set()
    json.dumps(records, allow_nan=False)


def test_dropped_layers_and_channels_come_back_for_the_better_part(make_job: MakeJob) -> None:
    for stage in (MagnitudeStructured(keep=0.6), DropLayers(drop=1, batches=1, batch=8)):
        chosen = stage(learned(make_job(folder=type(stage).__name__)))
        dense, before = loss(learned(make_job())), loss(chosen)
        after = loss(Repair()(replace(chosen, out=chosen.out / "repair")))
        assert after - dense < 0.8 * (before - dense), stage


def test_a_repair_that_does_not_help_is_taken_back_and_said(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    """The dense model is a random one: nearer to it is no better."""
    trained = MagnitudeStructured(keep=0.6)(learned(make_job()))
    other: Any = copy.deepcopy(learned(make_job()).model)
    generator = torch.Generator().manual_seed(3)
    for parameter in other.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.3, generator=generator)
    job = replace(trained, original=lambda dtype, device: copy.deepcopy(other), quiet=False, out=trained.out / "repair")
    before = {name: one.clone() for name, one in job.model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        after = Repair()(job)
    records = after.records["repair"]
    assert not records["applied"] and records["changed"] == 0
    assert records["held_out_loss"][1] >= records["held_out_loss"][0]
    assert all(torch.equal(one, before[name]) for name, one in after.model.state_dict().items())
    assert "so the repair is not applied" in caplog.text


def test_too_little_calibration_is_told_with_the_number_that_would_do(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = MagnitudeStructured(keep=0.6)(learned(make_job()))
    columns = max(shape.channels for shape in chosen.arch.shapes(chosen.model))
    columns = max(columns, 8 * max(shape.query_heads for shape in chosen.arch.shapes(chosen.model)))
    for examples, warned in ((4, True), (36, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            job = Repair(examples=examples)(
                replace(chosen, model=copy.deepcopy(chosen.model), quiet=False, out=chosen.out / f"repair-{examples}")
            )
        assert job.records["repair"]["tokens_wanted"] == 8 * columns
        assert (f"{8 * columns} of them would do" in caplog.text) == warned


def test_a_model_that_lost_nothing_is_left_alone_and_that_is_said(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    job = replace(learned(make_job()), quiet=False)
    before = {name: one.clone() for name, one in job.model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        after = Repair()(job)
    assert not after.records["repair"]["applied"]
    assert "nothing is fitted" in caplog.text
    assert all(torch.equal(one, before[name]) for name, one in after.model.state_dict().items())


def without_layer(job: Job, layer: int) -> Job:
    masks = {axis.name: torch.ones(axis.size) for axis in job.arch.axes(job.model) if axis.name == "layers"}
    masks["layers"][layer] = 0
    return job.without(masks, "test")


def test_a_first_layer_that_left_is_told(make_job: MakeJob, caplog: pytest.LogCaptureFixture) -> None:
    job = without_layer(learned(make_job()), 0)
    chosen = replace(job, quiet=False, out=job.out / "repair")
    with caplog.at_level(logging.WARNING):
        after = Repair()(chosen)
    assert after.records["repair"]["unabsorbed"] == ["0.attention", "0.mlp"]
    assert "0.attention, 0.mlp left with nothing before it" in caplog.text


def test_a_killed_repair_goes_on_to_the_same_bytes(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(folder: str) -> Job:
        job = MagnitudeStructured(keep=0.6)(learned(make_job(folder=folder)))
        return replace(job, out=job.out / "repair")

    whole = Repair()(chosen("whole"))
    real, left = module.Journal.write, [2]

    def dies(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Journal, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        Repair()(chosen("killed"))
    monkeypatch.setattr(module.Journal, "write", real)
    folder = chosen("killed").out
    assert len(list(folder.glob("step-*"))) == 2
    again = Repair()(chosen("killed"))
    assert again.records["repair"] == whole.records["repair"]
    assert all(torch.equal(one, again.model.state_dict()[name]) for name, one in whole.model.state_dict().items())
    with pytest.raises(ResumeError, match="knobs"):
        Repair(target="input")(chosen("killed"))
    shutil.rmtree(folder)


def test_what_it_cannot_work_on_is_refused(make_job: MakeJob) -> None:
    chosen = MagnitudeStructured(keep=0.6)(learned(make_job()))
    with pytest.raises(CheckpointError, match=r"needs the dense model.*set Job\.original"):
        Repair()(replace(chosen, original=None))
    with pytest.raises(DataError, match="1 calibration example:"):
        Repair()(replace(chosen, rows=chosen.rows[:1]))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_states_kept_elsewhere_give_the_same_records(make_job: MakeJob, place: str) -> None:
    def repaired(activations: str) -> Job:
        job = DropLayers(drop=1, batches=1, batch=8)(learned(make_job(folder=activations)))
        return Repair(activations=activations)(replace(job, out=job.out / "repair"))  # pyright: ignore[reportArgumentType]

    one, other = repaired("device"), repaired(place)
    assert one.records["repair"] == other.records["repair"]
    assert not Path(other.out, "activations").exists() or not list(Path(other.out, "activations").iterdir())


def test_each_default_is_a_knob_that_does_something(make_job: MakeJob) -> None:
    chosen = without_layer(learned(make_job()), 1)
    found: dict[str, torch.Tensor] = {}
    for name, knobs in {
        "default": {},
        "alike": {"tokens": "alike"},
        "zero": {"pull": "zero", "ridges": (0.3,), "alphas": (1.0,)},
        "old": {"pull": "old", "ridges": (0.3,), "alphas": (1.0,)},
        "behind": {"refit": "behind"},
    }.items():
        job = replace(chosen, model=copy.deepcopy(chosen.model), out=chosen.out / name)
        after = Repair(**knobs)(job)  # pyright: ignore[reportArgumentType]
        found[name] = torch.cat([one.flatten() for one in after.model.state_dict().values()])
    assert not torch.equal(found["default"], found["alike"])
    assert not torch.equal(found["zero"], found["old"])
    assert not torch.equal(found["default"], found["behind"])
