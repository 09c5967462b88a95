"""What plans say of zeroed and rounded weights is what runs find, and groups fit every width."""

import logging
import math
from typing import Any

import pytest
from tests.methods.conftest import MakeJob
from tests.methods.conftest import make_job as make_job

from compresso.core.rounding import recovered
from compresso.errors import RecipeError
from compresso.methods.awq import Awq
from compresso.methods.gptq import Gptq
from compresso.methods.magnitude import Magnitude
from compresso.methods.rtn import Rtn
from compresso.methods.sparsegpt import SparseGpt
from compresso.methods.wanda import Wanda
from compresso.stage import Compresses, Remarks
from compresso.sweep.compressed import fitting_group, other_group
from compresso.sweep.targets import matrix, names_of

ROUNDING = {"rtn": Rtn, "gptq": Gptq, "awq": Awq}


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("magnitude", Magnitude(sparsity=0.25)),
        ("magnitude", Magnitude(pattern="2:4")),
        ("wanda", Wanda()),
        ("sparsegpt", SparseGpt(pattern="2:8", block=16)),
        ("rtn", Rtn(bits=4, group=8)),
        ("gptq", Gptq(bits=3, group=16, symmetric=True)),
        ("awq", Awq(bits=4, group=16)),
    ],
)
def test_a_run_finds_what_was_planned(make_job: MakeJob, name: str, stage: Any) -> None:
    job = make_job()
    assert isinstance(stage, Compresses)
    planned = stage.compressed(job.model, job.arch)
    found = stage(job).records[name]
    assert planned.weights == sum(
        matrix(job.model, linear).numel() for linear in names_of(stage.check(job.model, job.arch))
    )
    assert found.get("sparsity") is None or found["sparsity"] == pytest.approx(planned.sparsity, abs=0.01)
    assert found.get("bits") == planned.bits


@pytest.mark.parametrize("name", ROUNDING)
def test_the_largest_group_that_fits_takes_the_place_of_another_and_is_said(
    make_job: MakeJob, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Inputs are 32 and 48 wide, so that 16 is the largest divisor of 64 that fits both."""
    job, stage = make_job(), ROUNDING[name](bits=3, group=64)
    assert isinstance(stage, Remarks)
    assert fitting_group(stage, job.model, job.arch) == 16
    (remark,) = stage.remarks(job.model, job.arch)
    assert remark == "groups of 16 inputs, the largest that fit, since 64 does not divide 32, 48"
    with caplog.at_level(logging.WARNING):
        done = stage(job)
    assert f"{name}: {remark}" in caplog.messages
    assert done.records[name]["group"] == 16
    for linear in names_of(stage.check(done.model, done.arch)):
        assert recovered(matrix(done.model, linear), 3, 16, symmetric=False), linear


def test_a_group_that_fits_stays_and_is_not_mentioned(make_job: MakeJob) -> None:
    job = make_job()
    for group in (0, 4, 8, 16):
        assert fitting_group(Rtn(group=group), job.model, job.arch) == group
        assert other_group(Rtn(group=group), job.model, job.arch) == []


def test_groups_that_would_be_smaller_than_their_scales_are_worth_are_refused(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(RecipeError, match="32 inputs, no multiple of 24"):
        Rtn(group=24).check(job.model, job.arch)
    assert math.gcd(24, 32, 48) < 16
