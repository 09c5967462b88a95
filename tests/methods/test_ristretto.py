"""Ristretto: budgets hold, what does nothing leaves, weights are the bank's, and killed runs go on."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedModel

from compresso.arch.queries import axes_of
from compresso.core.axis import Kind
from compresso.data import nano
from compresso.edit.gate import gated
from compresso.errors import DataError, ResourceError
from compresso.job import Job
from compresso.methods.repair import Repair
from compresso.methods.ristretto import Ristretto
from compresso.methods.ristretto_judge import Judge
from compresso.methods.ristretto_repaired import RepairedDivergence
from compresso.solve.evolve import Evolution
from compresso.sweep.candidates import CandidateDivergence
from tests.methods.conftest import MakeJob
from tests.methods.test_drop_layers import job_of
from tests.methods.test_drop_layers import planted as planted

CONTRACT = {"search": "none", "texts": 0, "judged": "found", "examples": 32, "judge_rows": 4}
SMALL = Evolution(generations=3, offspring=4, survivors=(2,), growth=2)


def ristretto(**knobs: Any) -> Ristretto:
    quick: dict[str, Any] = {"batches": 2, "batch": 2, "micro_batch": 2, "judge_rows": 4, "texts": 0, "steps": 3}
    return Ristretto(**{**quick, "evolution": SMALL, "judged": "found", **knobs})


@pytest.mark.parametrize("search", ["none", "dp", "evolve"])
@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_the_result_is_never_above_its_budget(make_job: MakeJob, search: str, keep: float) -> None:
    dense = make_job().cost()().parameters()["blocks"]
    job = ristretto(search=search, keep=keep)(make_job(folder="other"))
    kept = job.cost()().parameters()["blocks"]
    assert kept <= keep * dense and (kept == dense) == (keep == 1)
    assert job.records["ristretto"]["parameters_after"]["blocks"] == kept
    assert job.records["ristretto"]["masked_minus_smaller_max_abs"] < 1e-4


def test_a_whole_model_stays_bit_for_bit(make_job: MakeJob) -> None:
    job = make_job()
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    after = ristretto(search="dp", keep=1.0)(job).model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.slow
def test_layers_that_do_nothing_leave_whole(planted: tuple[PreTrainedModel, list[list[int]]], tmp_path: Path) -> None:
    model, rows = planted
    ids = torch.tensor(rows)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        job = ristretto(search="dp", keep=0.75)(job_of(copy.deepcopy(model), rows, tmp_path))
        torch.testing.assert_close(job.model(input_ids=ids).logits, before, rtol=0, atol=1e-4)
    assert job.model.config.num_hidden_layers == 6 and job.plan.kept["layers"] == (0, 1, 2, 5, 6, 7)


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("head", "channel"), ("channel",), ("head", "query", "mlp")])
def test_only_kinds_that_are_named_leave(make_job: MakeJob, kinds: tuple[str, ...]) -> None:
    job = ristretto(kinds=kinds, search="dp", keep=0.8)(make_job())
    named = {Kind(kind) for kind in kinds}
    dense = {axis.name: axis for axis in axes_of(job.arch, make_job(folder="b").model, (Kind.QUERY,))}
    left = {dense[name].kind for name, kept in job.plan.kept.items() if len(kept) < dense[name].size}
    assert left <= named | ({Kind.LAYER} if {Kind.ATTENTION, Kind.MLP} <= named else set())
    assert left


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_a_uniform_layout_has_one_width(make_job: MakeJob, keep: float) -> None:
    job = ristretto(layout="uniform", search="dp", keep=keep)(make_job())
    shapes = job.arch.shapes(job.model)
    widths = {axis.name.split(".", 2)[2]: set[int]() for axis in job.arch.axes(job.model) if axis.layer is not None}
    for axis in job.arch.axes(job.model):
        if axis.layer is not None:
            widths[axis.name.split(".", 2)[2]].add(axis.size)
    assert widths and all(len(sizes) == 1 for sizes in widths.values()), shapes
    assert job.cost()().parameters()["blocks"] < make_job(folder="b").cost()().parameters()["blocks"]


@pytest.mark.slow
def test_evolution_is_no_farther_than_where_it_began(make_job: MakeJob) -> None:
    records = ristretto(keep=0.6, search="evolve")(make_job()).records["ristretto"]
    assert records["history"] == sorted(records["history"], reverse=True)
    taken = records["judged"][records["taken"]]["divergence"]
    assert taken == min(one["divergence"] for one in records["judged"])


def test_what_was_judged_is_the_model_that_is_left(make_job: MakeJob) -> None:
    """The divergence in the records is that of the smaller model from the dense one, on the rows that judge."""
    stage, given = ristretto(keep=0.6, search="dp"), make_job()
    dense, rows = copy.deepcopy(given.model), stage.split_rows(given)[1]
    job = stage(given)
    records = job.records["ristretto"]
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        log_p, log_q = (model(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for model in (dense, job.model))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert records["judged"][records["taken"]]["divergence"] == pytest.approx(kl, rel=1e-4)


def test_weights_are_fitted_to_what_left(make_job: MakeJob) -> None:
    """The fitted model is nearer to dense than the same units with the weights that they had."""
    stage, given = ristretto(keep=0.75, search="none", kinds=("channel",)), make_job()
    dense, rows = copy.deepcopy(given.model), stage.split_rows(given)[0]
    job = stage(given)
    axes, ids = job.arch.axes(dense), torch.tensor([row["input_ids"] for row in rows])

    def distance(model: PreTrainedModel) -> float:
        with torch.no_grad():
            return float((model(input_ids=ids).logits - whole).square().mean())

    with torch.no_grad():
        whole = dense(input_ids=ids).logits
        with gated(dense, axes, job.plan.masks(axes)):
            masked = distance(dense)
    assert distance(job.model) < 0.8 * masked


class Killed(Exception):
    """Stands for a kill that nobody can catch."""


@pytest.mark.slow
@pytest.mark.parametrize(("repaired_rows", "places"), [(0, (1, 3, 6, 10)), (4, (5, 9))])
def test_a_run_killed_anywhere_goes_on_to_the_same_weights(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, repaired_rows: int, places: tuple[int, ...]
) -> None:
    knobs = {"keep": 0.6, "judged": "repaired", "examples": 12, "repaired_rows": repaired_rows}
    expected = ristretto(**knobs)(make_job(folder="whole"))
    kind = RepairedDivergence if repaired_rows else CandidateDivergence
    real, judged = kind.__call__, Judge.__call__
    for place in places:
        job, asked = make_job(folder=f"killed {place}"), 0

        def counted(place: int = place) -> None:
            nonlocal asked
            asked += 1
            if asked > place:
                raise Killed

        def tried(self: Any, levels: Any, stage: int, /) -> float:
            counted()
            return real(self, levels, stage)

        def judging(self: Judge, levels: Any) -> None:
            counted()
            judged(self, levels)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(kind, "__call__", tried)
            patched.setattr(Judge, "__call__", judging)
            ristretto(**knobs)(job)
        again = ristretto(**knobs)(make_job(folder=f"killed {place}"))
        assert again.plan == expected.plan and again.records == expected.records
        theirs = expected.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in again.model.state_dict().items())


def test_candidates_that_repeat_themselves_are_passed_over(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    said = iter([0.9] * 3 + [0.2])
    monkeypatch.setattr("compresso.methods.ristretto_judge.repetition_of", lambda *_: next(said))
    job = replace(make_job(), tokenizer=tokenizer)
    records = ristretto(keep=0.6, search="dp", texts=2)(job).records["ristretto"]
    assert [one["repetition"] for one in records["judged"]] == [0.9] * 3
    said = iter([0.9, 0.25, 0.9, 0.2])
    job = replace(make_job(folder="other"), tokenizer=tokenizer)
    assert ristretto(keep=0.6, search="dp", texts=2)(job).records["ristretto"]["taken"] == 1


def test_rows_that_judge_are_not_fitted_to(make_job: MakeJob) -> None:
    stage, job = ristretto(), make_job()
    seen, judges, compared = stage.split_rows(job)
    assert len(judges) == len(compared) == 4 and len(seen) + len(judges) + len(compared) == len(job.rows)
    assert len({id(row) for row in (*seen, *judges, *compared)}) == len(job.rows)


@pytest.mark.parametrize("search", ["dp", "evolve"])
def test_a_repair_behind_it_chooses_by_rows_that_the_bank_has_not_seen(make_job: MakeJob, search: Any) -> None:
    stage = ristretto(keep=0.6, search=search, beginnings=1)
    job = stage(make_job())
    seen, judges, compared = ({id(row) for row in rows} for rows in stage.split_rows(job))
    assert {id(job.rows[i]) for i in job.unseen()} == judges | compared
    knobs: Any = {"held": 0.1}
    fitted, chosen_by = Repair(**knobs)._rows(job)
    assert chosen_by and {id(row) for row in chosen_by} <= judges | compared
    assert fitted and {id(row) for row in fitted} <= seen


def test_repairs_of_what_is_judged_choose_by_such_rows_too(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, found = Repair._rows, list[Any]()

    def noted(self: Repair, job: Job) -> Any:
        found.append(drawn(self, job))
        return found[-1]

    monkeypatch.setattr(Repair, "_rows", noted)
    stage, job = ristretto(keep=0.6, search="evolve", beginnings=1, judged="repaired"), make_job()
    job = replace(job, original=lambda dtype, device: copy.deepcopy(job.model))
    seen, _, compared = ({id(row) for row in rows} for rows in stage.split_rows(job))
    stage(job)
    assert found
    for fitted, chosen_by in found:
        assert chosen_by and {id(row) for row in chosen_by} <= compared
        assert fitted and {id(row) for row in fitted} <= seen


def test_nothing_is_searched_by_the_rows_that_judge(make_job: MakeJob) -> None:
    """With other rows to judge by, the search from one beginning is the same, and the judgement is not."""
    found: list[Any] = []
    for folder, token in (("a", 1), ("b", 40)):
        stage, job = ristretto(search="evolve", keep=0.6, beginnings=1), make_job(folder=folder)
        judges = stage.split_rows(job)[1]
        others: list[Any] = [
            {"input_ids": [token] * 12, "labels": [token] * 12} if any(row is one for one in judges) else row
            for row in job.rows
        ]
        found.append(stage(replace(job, rows=others)).records["ristretto"])
    assert found[0]["history"] == found[1]["history"] and len(found[0]["history"]) == 4
    assert found[0]["judged"][0]["divergence"] != found[1]["judged"][0]["divergence"]


def test_bad_input_is_named(make_job: MakeJob) -> None:
    with pytest.raises(ValidationError, match="a bank holds attention, mlp, head, query, channel"):
        Ristretto(kinds=("hidden",))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="search=none keeps one share"):
        Ristretto(kinds=("mlp",), search="none")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"repaired_rows=1: .* give at least 2"):
        ristretto(repaired_rows=1)
    with pytest.raises(ValidationError, match="give search: dp"):
        ristretto(layout="uniform", search="evolve")
    job: Job = make_job()
    with pytest.raises(DataError, match="give at least 3"):
        ristretto()(replace(job, rows=job.rows[:2]))
    with pytest.raises(ResourceError, match="without --offload"):
        ristretto()(replace(job, offloaded=object()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keep=0\.01 allows"):
        ristretto(keep=0.01, kinds=("channel",))(make_job(folder="small"))
