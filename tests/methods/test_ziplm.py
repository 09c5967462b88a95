"""ZipLM: budgets hold, what is redundant leaves, weights are the bank's, and killed runs go on."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

import compresso.methods.ziplm as stages
from compresso.arch.costs import shape_facts
from compresso.arch.queries import axes_of
from compresso.core.axis import Kind
from compresso.core.latency_table import Conditions, LatencyTable
from compresso.core.measures import Measures
from compresso.errors import DataError, ResourceError
from compresso.job import Job
from compresso.methods.ziplm import ZipLM
from compresso.solve.bank import columns, kept, weights_at
from compresso.solve.bank import levels as bank_levels
from compresso.solve.evolve import Fitness
from compresso.solve.level_choice import Levels
from compresso.sweep.bank_file import read, read_moment
from compresso.sweep.candidate_loss import candidate_loss
from tests.methods.conftest import MakeJob
from tests.methods.test_drop_layers import job_of
from tests.methods.test_drop_layers import planted as planted

CONTRACT = {"search": {"evaluations": 1}, "examples": 32, "judge_rows": 4}


def ziplm(**knobs: Any) -> ZipLM:
    quick: dict[str, Any] = {"judge_rows": 4, "steps": 3, "search": {"evaluations": 12, "draws": 4, "patience": 4}}
    return ZipLM(**{**quick, **knobs})


def timed(job: Job) -> Job:
    """The job measured by a table, made by hand, in which the second half of a module is nearly free."""
    curves = {0: 0.0, 2: 0.3, 4: 4.1}, {0: 0.0, 16: 2.5, 32: 2.6, 48: 6.3}
    conditions = Conditions("torch", "decode", 1, 24, "float32")
    facts = shape_facts(job.arch, job.model)
    return replace(job, measures=Measures(LatencyTable(facts, {}, conditions, 1.7, *curves)))


@pytest.mark.parametrize("of", ["blocks", "macs", "kv"])
@pytest.mark.parametrize("keep", [1.0, 0.6, 0.35])
def test_the_result_is_never_above_its_budget(make_job: MakeJob, of: Any, keep: float) -> None:
    dense = float(make_job().cost()().count(of))
    job = ziplm(keep=keep, of=of)(make_job(folder="other"))
    left, records = float(job.cost()().count(of)), job.records["ziplm"]
    assert left <= keep * dense and (left == dense) == (keep == 1)
    assert left <= records["cost"]["found"] <= records["cost"]["limit"]
    assert records["masked_minus_smaller_max_abs"] < 1e-4


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.2])
def test_a_time_is_never_above_its_budget(make_job: MakeJob, keep: float) -> None:
    given = timed(make_job())
    dense = float(given.cost()().count("milliseconds"))
    stage = ziplm(keep=keep, of="milliseconds")
    job = stage(given)
    assert float(job.cost()().count("milliseconds")) <= keep * dense * (1 + 1e-12)
    assert not [name for name in job.plan.kept if "queries" in name], "the table tells nothing of single query heads"
    assert stage.remarks(given.model, given.arch) == [
        "no query leaves by itself, since a table of milliseconds holds no single ones"
    ]
    assert ziplm().remarks(given.model, given.arch) == []


def test_a_target_out_of_reach_names_the_floor(make_job: MakeJob) -> None:
    """1.7 of 32.9 ms are not in the layers."""
    with pytest.raises(ValueError, match=r"keep=0\.05 allows 1\.645 of 32\.9 milliseconds, but at least 1\.7 are kept"):
        ziplm(keep=0.05, of="milliseconds")(timed(make_job()))
    with pytest.raises(ValueError, match=r"layers\.0\.channels may not go below 16 of 48 units"):
        ziplm(keep=0.5, kinds=("channel",))(make_job(folder="small"))


def test_a_whole_model_stays_bit_for_bit(make_job: MakeJob) -> None:
    job = make_job()
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    after = ziplm(keep=1.0)(job).model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def twins(job: Job) -> Job:
    """The job with the last third of every FFN's channels a copy of the first."""
    with torch.no_grad():
        for block in job.model.model.layers:
            for one in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
                one[32:] = one[:16]
    return job


def test_of_twins_one_leaves_and_the_other_does_the_work_of_both(make_job: MakeJob) -> None:
    job = twins(make_job())
    dense, ids = copy.deepcopy(job.model), torch.tensor([row["input_ids"] for row in job.rows])
    share = 1 - 3 * 16 * 32 * 3 / job.cost()().parameters()["blocks"]
    job = ziplm(keep=share, kinds=("channel",), damping=1e-5)(job)
    for layer in range(3):
        left = job.plan.kept[f"layers.{layer}.channels"]
        assert sorted(unit % 32 for unit in left) == list(range(32)), "a twin of each stays"
        old, new = (model.model.layers[layer].mlp.down_proj.weight.detach() for model in (dense, job.model))
        expected = torch.stack([old[:, [u for u in range(48) if u % 32 == unit % 32]].sum(dim=1) for unit in left], 1)
        torch.testing.assert_close(new, expected, rtol=0, atol=0.01 * float(old.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(job.model(ids).logits, dense(ids).logits, rtol=0, atol=0.01)


@pytest.mark.slow
def test_layers_that_do_nothing_leave_whole(planted: tuple[PreTrainedModel, list[list[int]]], tmp_path: Path) -> None:
    model, rows = planted
    ids = torch.tensor(rows)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        job = ziplm(keep=0.75)(job_of(copy.deepcopy(model), rows, tmp_path))
        torch.testing.assert_close(job.model(input_ids=ids).logits, before, rtol=0, atol=1e-4)
    assert job.model.config.num_hidden_layers == 6 and job.plan.kept["layers"] == (0, 1, 2, 5, 6, 7)


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("head", "channel"), ("channel",), ("head", "query", "mlp")])
def test_only_kinds_that_are_named_leave(make_job: MakeJob, kinds: tuple[str, ...]) -> None:
    job = ziplm(kinds=kinds, keep=0.8)(make_job())
    named = {Kind(kind) for kind in kinds}
    dense = {axis.name: axis for axis in axes_of(job.arch, make_job(folder="b").model, (Kind.QUERY,))}
    left = {dense[name].kind for name, kept in job.plan.kept.items() if len(kept) < dense[name].size}
    assert left and left <= named | ({Kind.LAYER} if {Kind.ATTENTION, Kind.MLP} <= named else set())


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_a_uniform_layout_has_one_width(make_job: MakeJob, keep: float) -> None:
    dense = make_job(folder="b").cost()().parameters()["blocks"]
    job = ziplm(layout="uniform", keep=keep)(make_job())
    shapes = job.arch.shapes(job.model)
    assert len(shapes) == 3 and all(one == shapes[0] for one in shapes)
    assert 0 < job.cost()().parameters()["blocks"] <= keep * dense


@pytest.mark.parametrize("weighting", ["none", "stream"])
def test_weights_are_those_that_the_bank_computes_again(make_job: MakeJob, weighting: str) -> None:
    given = make_job()
    dense, folder = copy.deepcopy(given.model), given.out / "bank"
    job = ziplm(keep=0.45, kinds=("head", "query", "channel"), weighting=weighting)(given)
    bank, taken = read(folder), job.records["ziplm"]["levels"]
    assert bank.identity["knobs"]["weighting"] == weighting
    narrowed = 0
    for name, one in bank.sub_layers.items():
        told = taken[name]
        level = next(of for of in bank_levels(one) if (of.units, of.slots) == (told["units"], told["slots"]))
        assert told["error"] == pytest.approx(min(level.relative, 1))
        weight = weights_at(one, level, dense.get_submodule(one.consumer).weight, read_moment(folder, one), 0.01)  # type: ignore[arg-type]
        found = job.model.get_submodule(one.consumer).weight
        assert torch.equal(found, weight[:, columns(one, level)])  # type: ignore[arg-type]
        assert all(job.plan.kept[axis] == units for axis, units in kept(one, level).items())
        narrowed += found.shape[1] < weight.shape[1]  # type: ignore[union-attr]
    assert narrowed >= 4


def test_what_was_judged_is_the_model_that_is_left(make_job: MakeJob) -> None:
    """The losses in the records are those of the dense and the smaller model on the rows that judge."""
    stage, given = ziplm(keep=0.6), make_job()
    dense, judges = copy.deepcopy(given.model), stage.split_rows(given)[1]
    job = stage(given)
    told = job.records["ziplm"]["loss"]
    assert told["dense"] == pytest.approx(given.task.score(dense, judges).mean, rel=1e-6)
    assert told["found"] == pytest.approx(job.task.score(job.model, judges).mean, rel=1e-4)
    assert told["found"] == job.records["ziplm"]["history"][-1] <= told["plain"] == job.records["ziplm"]["history"][0]


class Killed(Exception):
    """Stands for a kill that nobody can catch."""


@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_run_killed_anywhere_goes_on_to_the_same_weights(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    expected = ziplm(keep=0.6)(make_job(folder="whole"))
    asked = list[Levels]()

    def dying(*given: Any) -> Any:
        inner: Callable[..., Any] = candidate_loss(*given)

        class Dying:
            def __enter__(self) -> Fitness:
                fitness = inner.__enter__()  # type: ignore[attr-defined]

                def tried(levels: Levels, stage: int, /) -> float:
                    asked.append(levels)
                    if len(asked) > place:
                        raise Killed
                    return fitness(levels, stage)

                return tried

            def __exit__(self, *_: object) -> None: ...

        return Dying()

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(stages, "candidate_loss", dying)
        ziplm(keep=0.6)(make_job(folder="killed"))
    again = ziplm(keep=0.6)(make_job(folder="killed"))
    assert again.plan == expected.plan and again.records == expected.records
    theirs = expected.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.model.state_dict().items())


def test_rows_that_judge_are_not_fitted_to(make_job: MakeJob) -> None:
    job = make_job()
    seen, judges = ziplm().split_rows(job)
    assert len(judges) == 4 and len(seen) + len(judges) == len(job.rows)
    assert not [row for row in judges if any(row is one for one in seen)]
    cut = ziplm(keep=0.6)(job)
    assert {id(job.rows[i]) for i in cut.unseen()} == {id(row) for row in judges}


def test_bad_input_is_named(make_job: MakeJob) -> None:
    with pytest.raises(ValidationError, match="a bank holds attention, mlp, head, query, channel"):
        ZipLM(kinds=("hidden",))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="none of these leave under layout=free and of=milliseconds"):
        ZipLM(kinds=("query",), of="milliseconds")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="none of these leave under layout=uniform and of=blocks"):
        ZipLM(kinds=("attention", "mlp"), layout="uniform")  # type: ignore[arg-type]
    job: Job = make_job()
    with pytest.raises(DataError, match="give at least 3"):
        ziplm()(replace(job, rows=job.rows[:2]))
    with pytest.raises(ResourceError, match="stage 'ziplm' puts candidates together in memory"):
        ziplm()(replace(job, offloaded=object()))  # type: ignore[arg-type]
