"""Fine-tuning with zeros: they stay 0 bit for bit, the loss is SquareHead's, what weighs nothing is not computed, and a
killed training goes on to the same weights.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

import compresso.stage.tuning
from compresso.core.axis import Kind
from compresso.core.row import Row
from compresso.errors import CheckpointError, RecipeError
from compresso.job import Job
from compresso.methods.magnitude import Magnitude
from compresso.methods.sparse_finetune import SparseFinetune, paired
from compresso.methods.wanda import Wanda
from compresso.stage import Card, Compresses, cards
from compresso.sweep.calibration import Calibration
from compresso.training import squarehead_objective
from compresso.training.fit import fit
from compresso.training.halves import Network
from compresso.training.order import Micro
from tests.methods.conftest import MakeJob
from tests.methods.test_distill import from_dense, without
from tests.methods.test_drop_experts import prepared as mixture

SHORT: dict[str, Any] = {"steps": 40, "batch": 8, "micro_batch": 8, "lr": 3e-3, "warmup": 0}


def prepared(job: Job) -> Job:
    """What the contract's tests start from: half of the weights are 0, and no stage has said so."""
    return replace(Magnitude(**HALF)(job), records={})


HALF: dict[str, Any] = {"sparsity": 0.5}
CONTRACT = {"steps": 4, "batch": 8, "micro_batch": 8, "lr": 1e-2}


def pruned(make_job: MakeJob, folder: str = "work", **knobs: Any) -> Job:
    return Magnitude(**{"sparsity": 0.7, **knobs})(make_job(folder=folder))


def tuned(job: Job, **knobs: Any) -> Job:
    return SparseFinetune(**{**SHORT, **knobs})(job)


def linears(model: PreTrainedModel) -> dict[str, Tensor]:
    return {f"{name}.weight": one.weight for name, one in model.named_modules() if isinstance(one, nn.Linear)}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"kl_weight": 1.0, "hard_weight": 0.0, "tokens": "all"},
        {"feature_weight": 0.0},
        {"chunk": 7, "norm": "token_l2"},
    ],
    ids=lambda knobs: ",".join(knobs) or "default",
)
def test_zeros_stay_bit_for_bit_and_the_others_learn(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    job = pruned(make_job)
    before = {name: weight.clone() for name, weight in linears(job.model).items() if "lm_head" not in name}
    after = tuned(job, weight_decay=0.1, **knobs)
    for name, weight in linears(after.model).items():
        if name in before:
            zero = before[name] == 0
            assert bool(zero.any()) and torch.equal(weight[zero], torch.zeros(int(zero.sum())))
            assert not torch.equal(weight[~zero], before[name][~zero])
    records = after.records["sparse_finetune"]
    assert records["zeros"] == sum(int((weight == 0).sum()) for weight in before.values())
    assert records["curve"]["loss"][-1] < records["curve"]["loss"][0]
    assert not any(parameter.requires_grad for parameter in after.model.parameters())


@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_a_pattern_holds_in_every_group(make_job: MakeJob, pattern: str) -> None:
    kept, group = map(int, pattern.split(":"))
    after = tuned(pruned(make_job, sparsity=None, pattern=pattern))
    for name, weight in linears(after.model).items():
        if "lm_head" not in name:
            counts = (weight.unflatten(1, (-1, group)) != 0).sum(-1)
            assert int(counts.min()) == int(counts.max()) == kept


def test_zeros_of_stacked_experts_stay_too(make_job: MakeJob) -> None:
    """A mixture keeps its experts in tensors of three dimensions, which are no linears."""
    given = Wanda(pattern="2:4", calibration=Calibration(8, 4))(mixture(make_job()))  # type: ignore[call-arg]
    before = {name: one.clone() for name, one in given.model.named_parameters()}
    job = tuned(replace(given, out=given.out / "tuned"), steps=4, feature_weight=0.0)
    stacks = [name for name, one in before.items() if one.dim() == 3]
    zeros = sum(int(one.partition("/")[0]) for one in given.records["wanda"]["zeros"].values())
    assert stacks and job.records["sparse_finetune"]["zeros"] == zeros
    for name in stacks:
        after = job.model.get_parameter(name)
        assert bool((after[before[name] == 0] == 0).all()), name
        assert not torch.equal(after, before[name]), name


def test_the_model_comes_nearer_to_dense(make_job: MakeJob) -> None:
    job = pruned(make_job)
    before = from_dense(job)
    assert from_dense(tuned(job, hard_weight=0.0)) < 0.7 * before


def objective_of(job: Job, **knobs: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    stage = SparseFinetune(**{**SHORT, **knobs})
    teacher = stage._teacher(job)  # pyright: ignore[reportPrivateUsage]
    objective = stage._objective(job, job.model, teacher)  # pyright: ignore[reportPrivateUsage]
    return lambda batch: objective(batch, Micro(0, 0, range(4)))


def test_features_are_the_published_sum_over_hidden_states(make_job: MakeJob) -> None:
    """Against transformers' own hidden states: the last is behind the final norm, the embeddings are none."""
    job = pruned(make_job)
    batch = job.collated(job.rows[:4])
    assert job.original is not None
    dense = job.original(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1:]
            for model in (job.model, dense)
        )
        expected = sum((a - b).square().mean() / (b.square().mean() + 2**-7) for a, b in zip(ours, theirs, strict=True))
        label = job.model(**batch).loss
    found = {name: value.detach() for name, value in objective_of(job, feature_weight=0.5)(batch).items()}
    assert float(found["features"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(found["hard"]) == pytest.approx(float(label), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(float(label) + 0.5 * float(expected), rel=1e-5)


def test_the_dense_model_itself_loses_nothing(make_job: MakeJob) -> None:
    job = make_job()
    asked = objective_of(job, hard_weight=0.0, kl_weight=1.0)(job.collated(job.rows[:2]))
    found = {name: value.detach() for name, value in asked.items()}
    assert float(found["features"]) == 0 and float(found["divergence"]) == pytest.approx(0, abs=1e-6)


def test_a_teacher_s_states_go_layer_by_layer(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a term is taken, the teacher's states of the layers before it are no more."""
    job, real, read = pruned(make_job), squarehead_objective.squared_error, Network.read
    states: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def counting(*given: Any) -> Tensor:
        alive.append(sum(state() is not None for state in states))
        return real(*given)

    def remembered(halves: Network, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        last, found = read(halves, batch)
        if halves.model is not job.model:
            states.extend(weakref.ref(state) for state in (*found[:-1], last))
        return last, found

    ask = objective_of(job)
    monkeypatch.setattr(Network, "read", remembered)
    monkeypatch.setattr(squarehead_objective, "squared_error", counting)
    ask(job.collated(job.rows[:4]))
    assert len(states) == 3 and alive == [2, 1, 0]


def test_padding_changes_nothing(make_job: MakeJob) -> None:
    job = pruned(make_job)
    short: list[Row] = [{"input_ids": row["input_ids"][:6], "labels": row["labels"][:6]} for row in job.rows[:2]]
    alone = job.collated(short)
    wide = {
        name: nn.functional.pad(value, (0, 5), value=-100 if name == "labels" else 0) for name, value in alone.items()
    }
    ask = objective_of(job, kl_weight=1.0)
    for name, value in ask(alone).items():
        assert float(ask(wide)[name].detach()) == pytest.approx(float(value.detach()), rel=1e-4)


def test_what_weighs_nothing_is_not_computed(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher whose logits are NaN does not matter without a divergence, and none is read if nothing is compared."""
    job = pruned(make_job)
    assert job.original is not None
    real = job.original

    def broken(dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        model = real(dtype, device)
        head = nn.Linear(32, 64, bias=False)
        with torch.no_grad():
            head.weight.fill_(float("nan"))
        model.lm_head = head  # pyright: ignore[reportAttributeAccessIssue]
        return model

    monkeypatch.setattr("compresso.training.halves.Network.check", lambda _: None)
    batch = job.collated(job.rows[:2])
    assert objective_of(replace(job, original=broken))(batch)["loss"].isfinite()
    assert not objective_of(replace(job, original=broken), kl_weight=1.0)(batch)["loss"].isfinite()
    assert tuned(replace(job, original=None), feature_weight=0.0, steps=2).records["sparse_finetune"]["updates"] == 2
    with pytest.raises(CheckpointError, match="feature_weight: 0 and kl_weight: 0"):
        tuned(replace(pruned(make_job, "other"), original=None))


@pytest.mark.parametrize(("kind", "gone"), [(Kind.HIDDEN, range(24, 32)), (Kind.LAYER, [1]), (Kind.MLP, [0])])
def test_smaller_students_learn_from_what_is_left(make_job: MakeJob, kind: Kind, gone: list[int]) -> None:
    job = Magnitude(**HALF)(without(make_job(), kind, gone))
    before = from_dense(job)
    after = tuned(job)
    assert from_dense(after) < before
    assert (
        after.records["sparse_finetune"]["curve"]["features"][-1]
        < after.records["sparse_finetune"]["curve"]["features"][0]
    )


def test_layers_are_compared_with_the_last_before_the_next() -> None:
    assert paired((0, 1, 2), 3) == [0, 1, 2]
    assert paired((1, 3), 6) == [2, 5]


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", [1, 17])
def test_a_killed_training_goes_on_to_the_same_weights(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    whole = tuned(pruned(make_job, "whole"), save_every=5)

    def dying(*given: Any, **named: Any) -> Any:
        after = named["after_update"]

        def killed(update: int) -> Any:
            if update == dies_at:
                raise KeyboardInterrupt
            return after(update)

        return fit(*given, **{**named, "after_update": killed})

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(compresso.stage.tuning, "fit", dying)
        tuned(pruned(make_job, "killed"), save_every=5)
    again = tuned(pruned(make_job, "killed"), save_every=5)
    theirs = whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.model.state_dict().items())


def test_a_weight_that_trained_to_0_is_no_zero_after_a_resume(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are of the model that pruning left, never of the training's checkpoint."""
    name = "model.layers.0.mlp.up_proj.weight"
    begun = pruned(make_job, "killed")
    place = tuple(begun.model.get_parameter(name).nonzero()[0].tolist())

    def dying(objective: Any, *given: Any, **named: Any) -> Any:
        after = named["after_update"]

        def passing(update: int) -> Any:
            told = after(update)
            with torch.no_grad():
                objective.model.get_parameter(name)[place] = 0
            if update == 17:
                raise KeyboardInterrupt
            return told

        return fit(objective, *given, **{**named, "after_update": passing})

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(compresso.stage.tuning, "fit", dying)
        tuned(begun, save_every=5)
    again = tuned(pruned(make_job, "killed"), save_every=5)
    assert again.records["sparse_finetune"]["zeros"] == sum(
        int((weight == 0).sum()) for key, weight in linears(pruned(make_job, "x").model).items() if "lm_head" not in key
    )
    assert again.model.get_parameter(name)[place] != 0


def test_the_guess_lets_accidental_zeros_grow(make_job: MakeJob) -> None:
    def with_one_zero(job: Job) -> Job:
        model = copy.deepcopy(job.model)
        with torch.no_grad():
            weights = linears(model)
            weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 0
            weights["model.layers.1.mlp.up_proj.weight"][:, ::2] = 0
        return replace(job, model=model)

    for masks, grows in (("all", False), ("infer", True)):
        job = tuned(with_one_zero(make_job(folder=masks)), masks=masks)
        assert bool(linears(job.model)["model.layers.0.mlp.up_proj.weight"][0, 0]) == grows
        assert not linears(job.model)["model.layers.1.mlp.up_proj.weight"][:, ::2].any()


def test_bad_input_is_named(make_job: MakeJob) -> None:
    with pytest.raises(ValidationError, match="nothing is minimised"):
        SparseFinetune(**{**SHORT, "hard_weight": 0.0, "feature_weight": 0.0})
    with pytest.raises(RecipeError, match=r"put .+ before it") as caught:
        tuned(make_job())
    assert all(name in str(caught.value) for name in ("sparsegpt", "wanda", "magnitude"))
    with pytest.raises(RecipeError, match="a tenth of its weights 0"):
        tuned(pruned(make_job, sparsity=0.05), masks="infer")


def required(one: Card) -> set[str]:
    return {knob.name for knob in one.knobs.values() if knob.default is dataclasses.MISSING}


def test_the_stages_named_as_a_cure_are_those_that_leave_zeros(make_job: MakeJob) -> None:
    """By what each foretells of itself, with its own knobs and with those that it is named with."""
    job = make_job()
    for one in cards().values():
        given = ({}, *([dict(one.zeroes)] if one.zeroes else []))
        made = [one.type(**knobs) for knobs in given if not required(one) - set(knobs)]
        found = [stage.compressed(job.model, job.arch) for stage in made if isinstance(stage, Compresses)]
        leaves = any(each.sparsity and each.bits is None for each in found)
        assert leaves == (one.zeroes is not None), one.name
