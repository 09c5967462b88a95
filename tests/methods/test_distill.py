"""Distillation brings a damaged model back towards the dense one,
whatever was removed, and survives an interruption.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compresso.stage.tuning
from compresso.core.axis import Kind
from compresso.errors import CheckpointError, NumericError, RecipeError
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.methods.magnitude_structured import MagnitudeStructured
from compresso.metrics.divergence import divergence, reference
from compresso.runner.run import run
from compresso.training.fit import fit
from tests.methods.conftest import MakeJob

SHORT: dict[str, Any] = {"batch": 8, "micro_batch": 8, "lr": 1e-2}


def from_dense(job: Job) -> float:
    """KL(dense || model) on held-out examples, nats a token."""
    assert job.original is not None
    dense = job.original(torch.float32, torch.device("cpu"))
    windows = [row["input_ids"] for row in job.held]
    return divergence(job.model, reference(dense, windows, corpus="held"))[0].value


def without(job: Job, kind: Kind, gone: Sequence[int]) -> Job:
    """The job without some units of every axis of a kind."""
    masks: dict[str, torch.Tensor] = {}
    for axis in job.arch.axes(job.model):
        if axis.kind == kind:
            masks[axis.name] = torch.ones(axis.size)
            masks[axis.name][list(gone)] = 0
    return job.without(masks, "test")


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"divergence": "reverse"},
        {"divergence": "js", "temperature": 2.0, "tokens": "all"},
        {"train": "all", "lr": 3e-3},
        {"intermediate_weight": 0.5, "chunk": 7},
        {"teacher_dtype": "bf16", "teacher_device": "cpu", "checkpointing": True},
    ],
    ids=lambda knobs: ",".join(knobs) or "default",
)
def test_a_damaged_model_comes_nearer_to_the_dense_one_and_keeps_its_shapes(
    make_job: MakeJob, knobs: dict[str, Any]
) -> None:
    damaged = MagnitudeStructured(keep=0.6)(make_job())
    before, shapes = from_dense(damaged), damaged.arch.shapes(damaged.model)
    job = Distill(**{"steps": 40, **SHORT, **knobs})(damaged)
    assert from_dense(job) < 0.7 * before
    assert job.arch.shapes(job.model) == shapes
    assert not any("lora" in name for name, _ in job.model.named_parameters())
    assert not any(parameter.requires_grad for parameter in job.model.parameters())
    records = job.records["distill"]
    assert records["updates"] == 40
    assert records["curve"]["divergence"][-1] < records["curve"]["divergence"][0]
    assert ("intermediate" in records["curve"]) == ("intermediate_weight" in knobs)
    everything = sum(parameter.numel() for parameter in job.model.parameters())
    assert (records["trainable"] == everything) == (knobs.get("train") == "all")


@pytest.mark.parametrize(
    ("kind", "gone"), [(Kind.HIDDEN, range(24, 32)), (Kind.LAYER, [1]), (Kind.ATTENTION, [2]), (Kind.MLP, [0])]
)
def test_hidden_states_are_paired_through_the_plan(make_job: MakeJob, kind: Kind, gone: Sequence[int]) -> None:
    """Whatever is removed: the first layer of a student without layer 1 is compared with the teacher's first, the
    second with its third.
    """
    damaged = without(make_job(), kind, gone)
    before = from_dense(damaged)
    job = Distill(steps=30, **SHORT, intermediate_weight=1.0)(damaged)
    assert from_dense(job) < before
    curve = job.records["distill"]["curve"]["intermediate"]
    assert curve[-1] < curve[0]


def test_only_targets_move_under_lora_and_everything_under_all(make_job: MakeJob) -> None:
    choices: dict[str, dict[str, Any]] = {"lora": {"targets": ("q_proj",)}, "all": {"train": "all"}}
    for name, knobs in choices.items():
        damaged = without(make_job(folder=name), Kind.CHANNEL, range(20))
        before = {one: parameter.detach().clone() for one, parameter in damaged.model.named_parameters()}
        after = dict(Distill(steps=3, **SHORT, **knobs)(damaged).model.named_parameters())
        moved = {one for one in before if not torch.equal(before[one], after[one])}
        assert moved == {one for one in before if name == "all" or "q_proj" in one}


def test_weights_in_half_precision_learn_in_float32_and_stay_half(make_job: MakeJob) -> None:
    job = without(make_job(), Kind.CHANNEL, range(20))
    job = replace(job, model=job.model.bfloat16())
    before = from_dense(job)
    after = Distill(steps=20, train="all", **{**SHORT, "lr": 1e-3})(job)
    assert after.model.dtype == torch.bfloat16
    assert from_dense(after) < before


def test_it_goes_on_where_it_was_interrupted(make_job: MakeJob) -> None:
    knobs = {**SHORT, "steps": 6, "save_every": 2, "dropout": 0.1}
    whole = Distill(**knobs)(without(make_job(folder="whole"), Kind.CHANNEL, range(20)))
    cut = without(make_job(folder="cut"), Kind.CHANNEL, range(20))
    shutil.copytree(whole.out / "step-000004", cut.out / "step-000004")
    resumed = Distill(**knobs)(cut)
    assert resumed.records["distill"] == whole.records["distill"]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_a_resumed_run_has_its_teacher_again(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smaller model comes from the finished stage, the teacher from where the run started."""
    recipe = {
        "data": {"held": 4, "prompt": False, "pack": False},
        "stages": [
            {"magnitude_structured": {"keep": 0.6}},
            {"distill": {"steps": 4, "batch": 4, "micro_batch": 4, "lr": 1e-2}},
        ],
    }

    def digest(name: str, **more: Any) -> str:
        result = run(
            recipe, tiny_folder, instructions, output=tmp_path / name, quiet=True, allow_collapsed=True, **more
        )
        return hashlib.sha256((result.folder / "model.safetensors").read_bytes()).hexdigest()

    whole = digest("whole")

    def fails(*_: Any, **__: Any) -> None:
        raise NumericError("the machine fails here")

    monkeypatch.setattr(compresso.stage.tuning, "fit", fails)
    with pytest.raises(NumericError, match="fails here"):
        digest("cut")
    monkeypatch.setattr(compresso.stage.tuning, "fit", fit)
    assert digest("cut", resume=True) == whole


def test_what_cannot_teach_is_refused_before_training(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compresso.stage.tuning, "fit", None)
    with pytest.raises(CheckpointError, match=r"set Job\.original"):
        Distill()(replace(make_job(), original=None))
    config = LlamaConfig(**{**make_job().model.config.to_dict(), "vocab_size": 72})
    with pytest.raises(RecipeError, match="vocabulary of 64, its teacher one of 72"):
        Distill()(replace(make_job(), original=lambda dtype, device: LlamaForCausalLM(config)))
