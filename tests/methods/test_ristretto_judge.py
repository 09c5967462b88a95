"""Candidates are judged apart from the model, once each, and the nearest that writes is taken."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from compresso.errors import NumericError
from compresso.job import Job
from compresso.methods.ristretto_judge import Judge
from compresso.solve.level_choice import Levels
from tests.methods.conftest import MakeJob


class Notes:
    """A journal in memory."""

    def __init__(self, *entries: Any) -> None:
        self.all = list(entries)

    def entries(self) -> list[Any]:
        return list(self.all)

    def append(self, entry: Any) -> None:
        self.all.append(entry)


def louder(job: Job, levels: Levels) -> Job:
    """The final norm's weights times 1 + the level: predictions sharpen with it."""
    with torch.no_grad():
        job.model.get_parameter("model.norm.weight").mul_(1 + levels[0])
    return job


def judge(job: Job, *, journal: Any = None, build: Any = louder) -> Judge:
    return Judge(build, None, job, job.held, 0, journal)


def test_the_nearest_is_the_one_that_changes_least(make_job: MakeJob) -> None:
    job = make_job()
    weights = {name: weight.clone() for name, weight in job.model.state_dict().items()}
    judged = judge(job)
    for levels in ((2,), (0,), (1,)):
        judged(levels)
    far = {levels: one["divergence"] for levels, one in judged.seen.items()}
    assert far[(0,)] == 0 < far[(1,)] < far[(2,)] and judged.best == (0,)
    assert judged.seen[(0,)]["loss"] == pytest.approx(job.task.score(job.model, job.held).mean)
    assert all(torch.equal(weight, weights[name]) for name, weight in job.model.state_dict().items())


def test_what_was_judged_is_neither_built_nor_noted_again(make_job: MakeJob) -> None:
    journal, built = Notes(), list[Levels]()

    def counted(job: Job, levels: Levels) -> Job:
        built.append(levels)
        return louder(job, levels)

    first = judge(make_job(), journal=journal, build=counted)
    for levels in ((1,), (0,), (1,)):
        first(levels)
    assert built == [(1,), (0,)] and len(journal.all) == 2
    again = judge(make_job(), journal=Notes(*journal.all), build=counted)
    for levels in ((1,), (0,), (2,)):
        again(levels)
    assert built == [(1,), (0,), (2,)]
    assert [again.seen[levels] for levels in ((1,), (0,))] == journal.all


def test_a_candidate_that_overflows_is_farther_than_all(make_job: MakeJob) -> None:
    def broken(job: Job, levels: Levels) -> Job:
        with torch.no_grad():
            job.model.get_parameter("model.norm.weight").mul_(float("inf") if levels[0] else 0.5)
        return job

    judged = judge(make_job(), build=broken)
    judged((1,))
    with pytest.raises(NumericError, match="all 1 candidates overflow"):
        judged.taken(1.0)
    judged((0,))
    assert judged.seen[(1,)] == {"divergence": None, "loss": None, "repetition": 1.0}
    assert judged.best == (0,) and judged.taken(1.0) == ((0,), 1)


def test_the_nearest_that_writes_is_taken(make_job: MakeJob) -> None:
    judged = judge(replace(make_job(), tokenizer=None))
    judged.seen = {
        (0,): {"divergence": 0.3, "loss": 1.0, "repetition": 0.05},
        (1,): {"divergence": 0.1, "loss": 1.0, "repetition": 0.9},
        (2,): {"divergence": 0.2, "loss": 1.0, "repetition": 0.1},
    }
    assert judged.best == (1,)
    assert judged.taken(0.1) == ((2,), 2)
    assert judged.taken(1.0) == ((1,), 1)
    assert judged.taken(0.0) == ((0,), 0)  # none writes as well as that: the one that repeats least
