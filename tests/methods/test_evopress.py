"""Depth by search: no set of parts is better, parts that do nothing leave, budgets hold, and killed runs go on."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedModel

from compresso.core.plan import Plan
from compresso.data import nano
from compresso.errors import BudgetError, NumericError
from compresso.job import Job
from compresso.methods.evopress import EvoPress
from compresso.solve.depth_search import as_layers
from compresso.solve.evolve import Evolution
from compresso.sweep.candidates import CandidateDivergence
from tests.methods.conftest import MakeJob
from tests.methods.test_drop_layers import job_of
from tests.methods.test_drop_layers import planted as planted

CONTRACT = {"search": "dp"}
QUICK: dict[str, Any] = {"batches": 4, "batch": 4, "micro_batch": 4}
SMALL = Evolution(generations=12, offspring=6, survivors=(3, 2), growth=2)


def searching(**knobs: Any) -> EvoPress:
    return EvoPress(**{**QUICK, "evolution": SMALL, **knobs})


@pytest.mark.parametrize("kinds", [("layer",), ("attention",), ("mlp",), ("attention", "mlp")])
@pytest.mark.parametrize("keep", [1.0, 0.8, 0.6])
def test_the_result_is_never_above_its_budget(make_job: MakeJob, kinds: tuple[str, ...], keep: float) -> None:
    dense = make_job().cost()().parameters()["blocks"]
    job = searching(kinds=kinds, keep=keep)(make_job())
    kept = job.cost()().parameters()["blocks"]
    assert kept <= keep * dense and (kept == dense) == (keep == 1)
    assert job.records["evopress"]["parameters_after"]["blocks"] == kept


@pytest.mark.slow
@pytest.mark.parametrize("search", ["dp", "evolve"])
def test_layers_that_do_nothing_leave_whole(
    planted: tuple[PreTrainedModel, list[list[int]]], search: str, tmp_path: Path
) -> None:
    model, rows = planted
    ids = torch.tensor(rows)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        stage = EvoPress(keep=0.75, search=search, evolution=SMALL, batches=2, batch=4, micro_batch=4)  # type: ignore[arg-type]
        job = stage(job_of(copy.deepcopy(model), rows, tmp_path))
        torch.testing.assert_close(job.model(input_ids=ids).logits, before, rtol=0, atol=1e-6)
    assert job.plan.kept["layers"] == (0, 1, 2, 5, 6, 7) and job.model.config.num_hidden_layers == 6
    assert job.records["evopress"]["gone"] == ["attention.3", "mlp.3", "attention.4", "mlp.4"]
    assert job.records["evopress"]["divergence"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_no_set_of_parts_within_the_budget_is_nearer_to_dense(make_job: MakeJob) -> None:
    job = make_job()
    stage = searching(keep=0.7, evolution=Evolution(generations=40, offspring=8, survivors=(4,), growth=1))
    done = stage(make_job(folder="other"))
    best = min(everything(job, stage, 0.7).values())
    assert done.records["evopress"]["divergence"] == pytest.approx(best, rel=1e-6)


def everything(job: Job, stage: EvoPress, keep: float) -> dict[tuple[int, ...], float]:
    """The divergence of every candidate within the budget, of whole smaller models."""
    from compresso.edit.gate import gated

    axes = [axis for axis in job.arch.axes(job.model) if axis.kind in ("attention", "mlp")]
    cost, found = job.cost(), dict[tuple[int, ...], float]()
    source = job.batches(4, "evopress")
    batches = list(stage.calibrates.read(source))

    def log_probs(batch: dict[str, Any]) -> torch.Tensor:
        given = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            return job.model(**given).logits.double().log_softmax(-1)[batch["attention_mask"].bool()]

    dense = [log_probs(batch) for batch in batches]
    for levels in itertools.product((0, 1), repeat=6):
        plan = Plan({axis.name: tuple(u for u in range(3) if not levels[2 * u + i]) for i, axis in enumerate(axes)})
        if float(cost.of(plan).count("blocks")) <= keep * float(cost().count("blocks")):
            with gated(job.model, axes, plan.masks(axes)):
                kl = torch.cat(
                    [(p.exp() * (p - log_probs(batch))).sum(-1) for p, batch in zip(dense, batches, strict=True)]
                )
            found[levels] = float(kl.mean())
    return found


def test_evolution_is_no_worse_than_the_choice_it_begins_at(make_job: MakeJob) -> None:
    dp, evolved = (
        searching(keep=0.6, search=search)(make_job(folder=search)).records["evopress"] for search in ("dp", "evolve")
    )
    assert dp["alone"] == evolved["alone"] and evolved["divergence"] <= dp["divergence"] == evolved["history"][0]


class Killed(Exception):
    """Stands for a kill that nobody can catch."""


@pytest.mark.slow
def test_a_search_killed_at_any_candidate_goes_on_to_the_same_weights(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = searching(keep=0.6)(make_job(folder="whole"))
    real, asked = CandidateDivergence.__call__, 0
    for place in (0, 3, 8, 14):
        job = make_job(folder=f"killed {place}")

        def dying(self: CandidateDivergence, levels: Any, stage: int, /, place: int = place) -> float:
            nonlocal asked
            asked += 1
            if asked > place:
                raise Killed
            return real(self, levels, stage)

        asked = 0
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(CandidateDivergence, "__call__", dying)
            searching(keep=0.6)(job)
        again = searching(keep=0.6)(make_job(folder=f"killed {place}"))
        assert again.plan == expected.plan and again.records == expected.records
        theirs = expected.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in again.model.state_dict().items())


@pytest.mark.slow
def test_the_seed_decides(make_job: MakeJob) -> None:
    runs = [searching(keep=0.6)(make_job(seed=seed, folder=f"{i}")) for i, seed in enumerate((0, 0, 1))]
    assert runs[0].records == runs[1].records != runs[2].records


def test_candidates_that_repeat_themselves_are_passed_over(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model writes first; the fittest of the others is said to repeat itself, the second is not."""
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    said = iter([0.2, 0.9, 0.25, 0.0])
    monkeypatch.setattr("compresso.methods.evopress.repetition_of", lambda *_: next(said))
    job = searching(keep=0.7)(replace(make_job(), tokenizer=tokenizer))
    records = job.records["evopress"]
    assert records["repetition"] == {"dense": 0.2, "finalists": [0.9, 0.25], "taken": 1} and records["texts"] == 4
    best = searching(keep=0.7)(make_job(folder="other"))
    assert best.records["evopress"]["texts"] == 0
    assert records["divergence"] > best.records["evopress"]["divergence"] and job.plan != best.plan
    said = iter([0.2, 0.9, 0.8, 0.85])
    monkeypatch.setattr("compresso.methods.evopress.repetition_of", lambda *_: next(said))
    least = searching(keep=0.7, finalists=3)(replace(make_job(folder="third"), tokenizer=tokenizer))
    assert least.records["evopress"]["repetition"]["taken"] == 1


@pytest.mark.slow
def test_what_is_written_is_written_by_the_candidate(
    planted: tuple[PreTrainedModel, list[list[int]]], tmp_path: Path
) -> None:
    model, rows = planted
    job = replace(job_of(copy.deepcopy(model), rows, tmp_path), tokenizer=AutoTokenizer.from_pretrained(nano.path()))
    records = EvoPress(keep=0.75, evolution=SMALL, batches=2, batch=4, micro_batch=4)(job).records["evopress"]
    assert records["repetition"]["finalists"][0] == pytest.approx(records["repetition"]["dense"])


def test_layers_that_lose_both_halves_are_layers(make_job: MakeJob) -> None:
    axes = make_job().arch.axes(make_job(folder="b").model)
    parts = [(name, unit) for unit in range(3) for name in ("attention", "mlp")]
    removed = [("attention", 0), ("attention", 1), ("mlp", 1), ("mlp", 2)]
    assert as_layers(axes, parts, removed) == ([("layers", 1)], [("attention", 0), ("mlp", 1)])
    assert as_layers(axes, parts[::2], removed[:2]) == ([], removed[:2])
    assert len(as_layers(axes, parts, parts)[0]) == 2


def test_a_model_of_which_no_part_may_leave_is_said(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CandidateDivergence, "__call__", lambda *_: float("nan"))
    with pytest.raises(NumericError, match="no levels with finite errors"):
        searching(keep=0.6)(make_job())
    real = iter([0.1] * 6)
    monkeypatch.setattr(CandidateDivergence, "__call__", lambda *_: next(real, float("nan")))
    with pytest.raises(NumericError, match="no candidate of the search predicts anything finite"):
        searching(keep=0.6)(make_job(folder="other"))


def test_bad_knobs_are_named(make_job: MakeJob) -> None:
    with pytest.raises(ValidationError, match="do not go together"):
        EvoPress(kinds=("layer", "mlp"))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="generation"):
        EvoPress(evolution={"generation": 3})  # type: ignore[arg-type]
    with pytest.raises((BudgetError, ValueError), match=r"keep=0\.1 allows"):
        searching(kinds=("mlp",), keep=0.1)(make_job())


def test_a_search_begins_no_farther_than_the_layers_of_least_influence(
    planted: tuple[PreTrainedModel, list[list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each part does alone is made to mislead; the search goes on from block influence then."""
    model, rows = planted
    real = CandidateDivergence.__call__

    def misled(self: CandidateDivergence, levels: Any, stage: int, /) -> float:
        value = real(self, levels, stage)
        return 10 - value if sum(levels) == 1 else value

    monkeypatch.setattr(CandidateDivergence, "__call__", misled)
    knobs: dict[str, Any] = {"keep": 0.75, "batches": 2, "batch": 4, "micro_batch": 4}
    runs = [
        EvoPress(**knobs, search=search, evolution=Evolution(generations=0))(
            job_of(copy.deepcopy(model), rows, tmp_path / search)
        ).records["evopress"]
        for search in ("dp", "evolve")
    ]
    assert runs[0]["divergence"] > 0.01 and runs[1]["divergence"] == pytest.approx(0, abs=1e-6)
    assert runs[1]["gone"] == ["attention.3", "mlp.3", "attention.4", "mlp.4"]
