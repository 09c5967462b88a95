"""Pairs of a teacher and what is left of its copy: layers, the query heads of key/value heads, hidden dimensions."""

import copy
from dataclasses import replace

import pytest

from compresso.core.one_stage import layer_map
from compresso.core.plan import Plan
from compresso.errors import RecipeError
from compresso.methods.qat_pairs import paired
from compresso.training.one_stage_objective import Taught
from tests.methods.conftest import MakeJob


def test_the_query_heads_of_the_heads_that_stay_are_compared(make_job: MakeJob) -> None:
    job = make_job()
    teacher, student = copy.deepcopy(job.model), job.task.halves(job.model, ())
    shape = job.arch.shapes(teacher)[1]
    each = shape.query_heads // shape.kv_heads
    job = replace(job, plan=Plan({"layers.1.heads": (1,), "hidden": (0, 2)}))
    found = paired(job, Taught(student, None), teacher, None, attentions=True)
    n = len(list(job.arch.blocks(teacher)))
    assert found.pairs == layer_map(n, n, None)
    taken = dict(zip(found.pairs.attentions, found.heads, strict=True))
    assert taken[1] is not None and taken[1].tolist() == list(range(each, 2 * each)) and taken[0] is None
    assert found.dimensions is not None and found.dimensions.tolist() == [0, 2]


def test_what_cannot_be_paired_is_refused(make_job: MakeJob) -> None:
    job = make_job()
    taught, teacher = Taught(job.task.halves(job.model, ()), None), copy.deepcopy(job.model)
    with pytest.raises(RecipeError, match="teacher_layers"):
        paired(job, taught, teacher, (0, 99), attentions=False)
    apart = replace(job, plan=Plan({"layers.0.queries": (0,)}))
    with pytest.raises(RecipeError, match="single query heads have left"):
        paired(apart, taught, teacher, None, attentions=True)
    paired(apart, taught, teacher, None, attentions=False)
