"""Candidates of an evolution, compared once they are repaired: what is measured, and on which rows."""

import copy
from dataclasses import replace

import pytest
import torch

from compresso.core.axis import Kind
from compresso.core.plan import Plan
from compresso.errors import DataError, NumericError
from compresso.job import Job
from compresso.methods import ristretto_repaired
from compresso.methods.repair import Repair
from compresso.methods.ristretto_repaired import RepairedDivergence, few_rows
from compresso.solve.level_choice import Levels
from tests.methods.conftest import MakeJob


def without_layers(job: Job, levels: Levels) -> Job:
    """The job without the layers whose level is 1."""
    layers = [axis for axis in job.arch.axes(job.model) if axis.kind == Kind.LAYER]
    kept = tuple(i for i, level in enumerate(levels) if not level)
    return job.without(Plan({layers[0].name: kept}).masks(layers), "test") if 1 in levels else job


def kl(dense: torch.nn.Module, other: torch.nn.Module, rows: list[list[int]]) -> float:
    ids = torch.tensor(rows)
    with torch.no_grad():
        log_p, log_q = (one(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for one in (dense, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_a_candidate_is_compared_as_its_repair_makes_it(make_job: MakeJob) -> None:
    job = make_job()
    few, apart = replace(job, rows=job.rows[:10]), job.rows[10:16]
    fitness = RepairedDivergence(without_layers, few, 4, apart, [3, 6])
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    levels: Levels = (0, 0, 1, *(0,) * (len(job.arch.blocks(job.model)) - 3))
    found = [fitness(levels, stage) for stage in (0, 1, 1)]
    assert found[1] == found[2]  # also once the dense stream is known
    assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())
    cut = without_layers(replace(job, model=copy.deepcopy(job.model)), levels)
    rows = [row["input_ids"] for row in apart]
    plain = kl(job.model, cut.model, rows)
    held_first = [*few.rows[2:], *few.rows[:2]]  # the first fifth says whether a fit helps
    repaired = Repair(alphas=(1.0,), ridges=(0.3,), examples=10, batch=4)
    by_stage = repaired(replace(cut, rows=held_first, out=job.out / "other"))
    assert found[1] < plain
    assert found[1] == pytest.approx(
        kl(job.model, by_stage.model, rows), rel=0.2
    )  # which draws its own rows to hold out
    assert found[0] == pytest.approx(kl(job.model, fitness._repaired(levels), rows[:3]), rel=1e-4)
    assert fitness((0,) * len(levels), 1) == pytest.approx(0, abs=1e-9)
    assert fitness.facts == {
        "tokens": sum(map(len, rows)),
        "compared": sum(len(row) - 1 for row in rows),
        "repaired_rows": 10,
    }


def test_what_overflows_is_worst(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()

    def overflowing(*_: object, **__: object) -> None:
        raise NumericError("NaN")

    fitness = RepairedDivergence(without_layers, replace(job, rows=job.rows[:4]), 4, job.rows[4:6], [2])
    monkeypatch.setattr(ristretto_repaired, "repair_", overflowing)
    value = fitness((1, *(0,) * (len(job.arch.blocks(job.model)) - 1)), 0)
    assert value != value


def test_rows_to_repair_on_are_drawn_from_all(make_job: MakeJob) -> None:
    job = make_job()
    found = few_rows(job, 6).rows
    assert len({id(row) for row in found}) == 6 and all(any(row is one for one in job.rows) for row in found)
    assert found != job.rows[:6] and found == few_rows(job, 6).rows
    assert len(few_rows(job, 10_000).rows) == len(job.rows)
    with pytest.raises(DataError, match=r"1 row to repair candidates on.*repaired_rows: 0"):
        few_rows(replace(job, rows=job.rows[:1]), 4)
