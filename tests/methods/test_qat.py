"""Training with roundings: few levels where they should be, the published loss, zeros that stay, a decoder that loses
by its activations, and a killed training that goes on to the same weights.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

import compresso.stage.tuning
from compresso.core.axis import Kind
from compresso.core.one_stage import layer_map
from compresso.core.quantisers import Quantiser, Style
from compresso.core.row import Row
from compresso.edit.eager import eager
from compresso.edit.patches import unpatch_
from compresso.edit.quantise_inputs import Inputs, behind_activations
from compresso.edit.quantised import QuantisedModel
from compresso.errors import CheckpointError, RecipeError
from compresso.job import Job
from compresso.methods.magnitude import Magnitude
from compresso.methods.qat import Qat
from compresso.methods.recover import Recover
from compresso.training.fit import fit
from compresso.training.one_stage_objective import OneStageObjective
from compresso.training.order import Micro
from tests.methods.conftest import MakeJob
from tests.methods.test_distill import without

UNATTENDED: dict[str, Any] = {"attention_weight": 0.0}
SPARSE: dict[str, Any] = {"sparsity": 0.6}
LONG: dict[str, Any] = {"steps": 60, "batch": 8, "micro_batch": 8, "lr": 1e-2, "rank": 8}
SHORT: dict[str, Any] = {"steps": 30, "batch": 8, "micro_batch": 8, "lr": 3e-3, "warmup": 0}


def trained(job: Job, **knobs: Any) -> Job:
    return Qat(**{**SHORT, **knobs})(job)


def linears(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: one.weight for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    return {name: weight for name, weight in found.items() if "lm_head" not in name}


def held(job: Job) -> float:
    return job.task.score(job.model, job.held).mean


def levels(row: Tensor) -> int:
    return len(row.unique())


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_row_of_every_linear_has_few_levels(make_job: MakeJob, bits: int, style: Style) -> None:
    before = make_job()
    after = trained(make_job(), weight_bits=bits, quantisers=style, steps=2)
    for name, weight in linears(after.model).items():
        assert all(levels(row) <= ({1: 2, 2: 3}.get(bits) or 2**bits) for row in weight)
        assert bits == 8 or levels(linears(before.model)[name]) > 100
    assert after.records["qat"]["bits"] == pytest.approx(bits + 16 * 21 * 44 / (21 * 44 * 37), abs=0.5)
    assert not any(parameter.requires_grad for parameter in after.model.parameters())


def test_what_the_linears_read_has_few_levels_a_token(make_job: MakeJob) -> None:
    after = trained(make_job(), steps=2)
    seen: list[Tensor] = []
    for name in linears(after.model):
        after.model.get_submodule(name).register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        logits = after.model(**after.collated(after.held)).logits
    assert len(seen) == 21 and all(levels(token) <= 16 for one in seen for token in one.flatten(0, -2))
    assert after.records["qat"]["activation_bits"] == 4 and after.records["qat"]["activations_simulated"]
    unpatch_(after.model)
    with torch.no_grad():
        assert not torch.equal(after.model(**after.collated(after.held)).logits, logits)


@pytest.mark.slow
def test_it_learns_and_8_bits_are_near_dense(make_job: MakeJob) -> None:
    dense = Recover(**LONG)(make_job())
    taught = replace(dense, records={}, original=lambda _, __: copy.deepcopy(dense.model))

    def loss(folder: str, **knobs: Any) -> float:
        job = replace(taught, model=copy.deepcopy(dense.model), out=dense.out.parent / folder)
        return held(trained(job, lr=1e-3, **knobs))

    after = trained(replace(taught, model=copy.deepcopy(dense.model), out=dense.out.parent / "qat"), lr=1e-3)
    curve = after.records["qat"]["curve"]
    assert curve["loss"][-1] < curve["loss"][0] and {"soft", "attention", "hidden"} <= set(curve)
    exact, rounded = held(dense), loss("ptq", steps=0)
    assert abs(loss("w8a8", weight_bits=8, input_bits=8, steps=0) - exact) < 0.1 * (rounded - exact)
    assert held(after) < rounded


def test_16_bits_round_nothing(make_job: MakeJob) -> None:
    job = make_job()
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    after = trained(job, weight_bits=16, input_bits=16, steps=0)
    assert after.patches == () and after.records["qat"]["bits"] is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.model.state_dict().items())


def test_without_updates_it_is_rounding_to_nearest(make_job: MakeJob) -> None:
    job = make_job()
    before = {name: weight.clone() for name, weight in linears(job.model).items()}
    after = trained(replace(job, original=None), steps=0)
    for name, weight in linears(after.model).items():
        assert torch.equal(weight, Quantiser(4)(before[name]))


def objective_of(job: Job, **knobs: Any) -> OneStageObjective:
    stage = Qat(**{**SHORT, "weight_bits": 16, "input_bits": 16, **knobs})
    teacher = stage._teacher(job)  # pyright: ignore[reportPrivateUsage]
    for model in (job.model, teacher):
        if model is not None:
            model.set_attn_implementation("eager")
    rounded = QuantisedModel(job.model, (), Quantiser(16), Inputs(16, Style.TEXTBOOK, ()))
    return stage._objective(job, job.model, teacher, rounded)  # pyright: ignore[reportPrivateUsage]


def moved(job: Job) -> Job:
    """Another student than its teacher."""
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.05)
    return job


def asked(objective: Callable[..., Any], batch: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in objective(batch, Micro(0, 0, range(4))).items()}


def test_the_loss_is_the_published_sum_over_transformers_own_outputs(make_job: MakeJob) -> None:
    """Against `output_attentions` and `output_hidden_states`; of the last layer before the final norm."""
    job = moved(make_job())
    objective, batch = objective_of(job, hard_weight=0.5), job.collated(job.rows[:4])
    assert job.original is not None
    dense = job.original(torch.float32, torch.device("cpu"))
    dense.set_attn_implementation("eager")
    norms: list[list[Tensor]] = []
    for model in (job.model, dense):
        norms.append([])
        model.model.norm.register_forward_pre_hook(lambda _, given, kept=norms[-1]: kept.append(given[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=batch["input_ids"], output_hidden_states=True, output_attentions=True)
            for model in (job.model, dense)
        )
        attention = sum((a - b).square().mean() for a, b in zip(ours.attentions, theirs.attentions, strict=True))
        states = [(*one.hidden_states[:-1], last[-1]) for one, last in zip((ours, theirs), norms, strict=True)]
        hidden = sum((a - b).square().mean() for a, b in zip(*states, strict=True))
        p, q = theirs.logits[:, :-1].softmax(-1), ours.logits[:, :-1].log_softmax(-1)
        soft, label = -(p * q).sum(-1).mean(), job.model(**batch).loss
    found = asked(objective, batch)
    for name, wanted in (("attention", attention), ("hidden", hidden), ("soft", soft), ("hard", label)):
        assert found[name] == pytest.approx(float(wanted), rel=1e-4), name
    assert found["loss"] == pytest.approx(float(attention + hidden + soft + 0.5 * label), rel=1e-4)
    scripts = asked(objective_of(job, soft_over="classes"), batch)
    assert scripts["soft"] == pytest.approx(float(soft) / 64, rel=1e-4)


def test_the_teacher_itself_loses_nothing_but_its_entropy(make_job: MakeJob) -> None:
    job = make_job()
    found = asked(objective_of(job), job.collated(job.rows[:2]))
    assert found["attention"] == 0 and found["hidden"] == 0 and found["soft"] > 0


def test_padding_changes_nothing(make_job: MakeJob) -> None:
    job = moved(make_job())
    short: list[Row] = [{"input_ids": row["input_ids"][:6], "labels": row["labels"][:6]} for row in job.rows[:2]]
    alone = job.collated(short)
    wide = {
        name: nn.functional.pad(value, (0, 5), value=-100 if name == "labels" else 0) for name, value in alone.items()
    }
    objective = objective_of(job)
    for name, value in asked(objective, alone).items():
        assert asked(objective, wide)[name] == pytest.approx(value, rel=1e-4), name


def test_padding_moves_no_learned_range(make_job: MakeJob) -> None:
    """Of the first layer, whose inputs at padding are those of a token that no text here has."""
    found: list[Tensor] = []
    for folder, wide in (("alone", 0), ("wide", 5)):
        job = make_job(folder=folder)
        with torch.no_grad():
            job.model.get_input_embeddings().get_parameter("weight")[0, 0] = 1e4  # padding's
        stage = Qat(**{**SHORT, "inputs": "learned", "input_bits": 8})
        names = list(linears(job.model))
        rounded = QuantisedModel(job.model, names, Quantiser(16), Inputs(8, Style.TEXTBOOK, tuple(names)), 0.9)
        teacher = stage._teacher(job)  # pyright: ignore[reportPrivateUsage]
        objective = stage._objective(job, job.model, teacher, rounded)  # pyright: ignore[reportPrivateUsage]
        batch = job.collated([{"input_ids": row["input_ids"][:6], "labels": row["labels"][:6]} for row in job.rows[:2]])
        padded = {
            name: nn.functional.pad(value, (0, wide), value=-100 if name == "labels" else 0)
            for name, value in batch.items()
        }
        with eager(job.model, teacher or job.model):
            objective.train()(padded, Micro(0, 0, range(2)))
        ranges = rounded.ranges()
        assert ranges is not None
        found.append(ranges)
    torch.testing.assert_close(*found)


def test_what_weighs_nothing_asks_no_teacher(make_job: MakeJob) -> None:
    alone = {"logit_weight": 0.0, "attention_weight": 0.0, "hidden_weight": 0.0, "hard_weight": 1.0}
    after = trained(replace(make_job(), original=None), steps=2, **alone)
    assert set(after.records["qat"]["curve"]) == {"update", "loss", "hard"}
    with pytest.raises(CheckpointError, match="logit_weight: 0, attention_weight: 0, hidden_weight: 0"):
        trained(replace(make_job(folder="other"), original=None))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "gone"),
    [(Kind.HIDDEN, range(24, 32)), (Kind.LAYER, [1]), (Kind.MLP, [0]), (Kind.HEAD, [1]), (Kind.ATTENTION, [2])],
)
def test_smaller_students_learn_from_what_is_left(make_job: MakeJob, kind: Kind, gone: list[int]) -> None:
    after = trained(without(make_job(), kind, gone), weight_bits=8, input_bits=16)
    curve = after.records["qat"]["curve"]
    assert curve["loss"][-1] < curve["loss"][0]
    if kind == Kind.HEAD:  # of its own heads: nothing else has left in front of the first attention
        found = asked(objective_of(without(make_job(folder="other"), kind, gone)), after.collated(after.rows[:2]))
        assert found["attention"] >= 0


def test_a_reduced_student_learns_from_the_layers_it_began_as(make_job: MakeJob) -> None:
    job = without(make_job(), Kind.LAYER, [1])
    objective = objective_of(job)
    assert objective._taught.pairs == layer_map(2, 3, (0, 2))  # pyright: ignore[reportPrivateUsage]
    other = objective_of(job, teacher_layers=(1, 2))
    assert other._taught.pairs == layer_map(2, 3, (1, 2))  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(ValidationError, match=r"teacher_layers=\[\] names none"):
        Qat(teacher_layers=())
    with pytest.raises(RecipeError, match=r"teacher_layers: layers \[1, 3\]: wanted 2 of the teacher's 0 to 2"):
        objective_of(job, teacher_layers=(1, 3))


def test_attention_is_eager_while_it_trains_and_that_is_said(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noted(*given: Any, **named: Any) -> Any:
        seen.append(given[0].model.config._attn_implementation)
        return fit(*given, **named)

    monkeypatch.setattr(compresso.stage.tuning, "fit", noted)
    job = replace(make_job(), quiet=False)
    (said,) = Qat().remarks(job.model, job.arch)
    after = trained(job, steps=2)
    assert seen == ["eager"] and after.model.config._attn_implementation == "sdpa"
    assert "eager attention while it trains, since sdpa shows no probabilities" in said and said in caplog.text
    assert after.records["qat"]["attention"] == "eager, sdpa otherwise"
    trained(make_job(folder="other"), steps=2, **UNATTENDED)
    assert seen[1:] == ["sdpa"] and Qat(**UNATTENDED).remarks(job.model, job.arch) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [{"weights_kept": 0.3}, {"channels_kept": 0.5}, {"heads_kept": 0.25}, {"weights_kept": 0.5, "heads_kept": 0.5}],
    ids=lambda knobs: ",".join(knobs),
)
@pytest.mark.parametrize("prune_at", [0, 7])
def test_what_is_pruned_is_0_behind_the_rounding(make_job: MakeJob, knobs: dict[str, float], prune_at: int) -> None:
    after = trained(make_job(), prune_at=prune_at, weight_decay=0.1, **knobs)
    weights = linears(after.model)
    facts = after.records["qat"]
    assert facts["pruned_at"] == prune_at and facts["sparsity"] > 0
    for i in range(3):
        inside, attention = f"model.layers.{i}.mlp.", f"model.layers.{i}.self_attn."
        if "weights_kept" in knobs:
            for name in ("up_proj", "down_proj"):
                weight = weights[f"{inside}{name}"]
                assert int((weight == 0).sum()) >= int((1 - knobs["weights_kept"]) * weight.numel())
        if "channels_kept" in knobs:
            gone = ~weights[f"{inside}up_proj"].any(dim=1)
            assert int(gone.sum()) == 24 and not weights[f"{inside}down_proj"][:, gone].any()
            assert not weights[f"{inside}gate_proj"][gone].any()
        if "heads_kept" in knobs:
            read = weights[f"{attention}o_proj"].any(dim=0).reshape(4, 16).any(dim=1)
            assert int(read.sum()) == 4 * knobs["heads_kept"]
            written = weights[f"{attention}v_proj"].any(dim=1).reshape(4, 8).any(dim=1)
            assert written.tolist() == read.tolist()


def test_zeros_that_were_there_stay(make_job: MakeJob) -> None:
    job = Magnitude(**SPARSE)(make_job())
    before = {name: weight == 0 for name, weight in linears(job.model).items()}
    after = trained(job)
    assert all(not weight[before[name]].any() for name, weight in linears(after.model).items())
    assert after.records["qat"]["sparsity"] == pytest.approx(0.6, abs=0.01)


def test_learned_ranges_go_with_the_result(make_job: MakeJob) -> None:
    after = trained(make_job(), inputs="learned")
    (patch,) = after.patches
    ranges = patch.tensors["ranges"]
    assert patch.name == "quantise_inputs_in_range" and list(ranges.shape) == [21, 2]
    assert bool((ranges[:, 0] < ranges[:, 1]).all())
    seen: list[Tensor] = []
    name = patch.params["symmetric"][0]
    after.model.get_submodule(name).register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        after.model(**after.collated(after.held))
    assert levels(seen[0]) <= 15


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, {"inputs": "learned", "weights_kept": 0.5, "prune_at": 9, "evaluations": 3}])
@pytest.mark.parametrize("dies_at", [1, 8, 17])
def test_a_killed_training_goes_on_to_the_same_weights(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, dies_at: int, knobs: dict[str, Any]
) -> None:
    whole = trained(make_job(folder="whole"), save_every=5, **knobs)

    def dying(*given: Any, **named: Any) -> Any:
        after = named["after_update"] or (lambda _: None)

        def killed(update: int) -> Any:
            if update == dies_at:
                raise KeyboardInterrupt
            return after(update)

        return fit(*given, **{**named, "after_update": killed})

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(compresso.stage.tuning, "fit", dying)
        trained(make_job(folder="killed"), save_every=5, **knobs)
    again = trained(make_job(folder="killed"), save_every=5, **knobs)
    theirs = whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.model.state_dict().items())
    assert again.patches == whole.patches and again.records == whole.records
    for mine, other in zip(again.patches, whole.patches, strict=True):
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in mine.tensors.items())


def test_embeddings_are_rounded_where_no_head_shares_them(make_job: MakeJob) -> None:
    after = trained(make_job(tied=False), embeddings=True, steps=2)
    assert all(levels(row) <= 15 for row in after.model.get_input_embeddings().get_parameter("weight"))
    with pytest.raises(RecipeError, match="embeddings=true, and the head shares their weight"):
        trained(make_job(folder="other"), embeddings=True)


def test_a_gate_leaves_no_one_sided_inputs(make_job: MakeJob) -> None:
    job = make_job()
    assert behind_activations(job.arch.axes(job.model)) == set()
    assert trained(job, asymmetric="all", steps=2).records["qat"]["asymmetric_inputs"] == 21


def test_bad_input_is_named() -> None:
    for knobs, said in (
        ({"weight_bits": 9}, "bits=9: wanted 1 to 8, or 16"),
        ({"weight_bits": 2, "weight_symmetric": False}, "give symmetric=True"),
        ({"input_bits": 12}, "bits=12: wanted 1 to 8"),
        ({"logit_weight": 0, "attention_weight": 0, "hidden_weight": 0}, "are all 0; give one of them"),
        ({"inputs": "learned", "checkpointing": True}, "would see each batch twice"),
        ({"inputs": "learned", "steps": 0}, "learns no range with steps=0"),
    ):
        with pytest.raises(ValidationError, match=said):
            Qat(**knobs)
