"""A job's records of what a stage removed, however often it removes."""

import torch

from compresso.core.axis import Axis, Kind
from compresso.core.plan import Plan
from compresso.job import Job
from tests.methods.conftest import MakeJob
from tests.methods.conftest import make_job as make_job


def masks(job: Job, kind: Kind, keep: int) -> dict[str, torch.Tensor]:
    """The first `keep` units of every axis of a kind."""
    axes: list[Axis] = [axis for axis in job.arch.axes(job.model) if axis.kind == kind]
    return Plan({axis.name: tuple(range(keep)) for axis in axes}).masks(axes)


def test_records_cover_all_that_a_stage_removed(make_job: MakeJob) -> None:
    """Channels, one of three layers, then channels of what is left: numbered and counted as the stage found them."""
    job = make_job()
    before = job.cost()().parameters()
    job = job.without(masks(job, Kind.CHANNEL, 32), "rounds")
    layers = torch.tensor([1.0, 0.0, 1.0])
    job = job.without({"layers": layers}, "rounds", round=2)
    job = job.without(masks(job, Kind.CHANNEL, 16), "rounds")
    facts = job.records["rounds"]
    after = job.cost()().parameters()
    assert facts["parameters_before"] == before and facts["parameters_after"] == after
    assert facts["kept_share_of_blocks"] == after["blocks"] / before["blocks"]
    assert facts["units_kept"] == {
        "layers.0.channels": "16/48",
        "layers.1.channels": "32/48",
        "layers.2.channels": "16/48",
        "layers": "2/3",
    }
    assert facts["round"] == 2


def test_the_next_stage_counts_from_what_it_was_given(make_job: MakeJob) -> None:
    job = make_job()
    job = job.without(masks(job, Kind.CHANNEL, 32), "first")
    between = job.cost()().parameters()
    job = job.without(masks(job, Kind.CHANNEL, 16), "second")
    assert job.records["first"]["parameters_after"] == job.records["second"]["parameters_before"] == between
    assert job.records["second"]["units_kept"]["layers.0.channels"] == "16/32"


def test_the_largest_difference_of_all_rounds_is_recorded(make_job: MakeJob) -> None:
    """Folding soft masks differs by rounding, removing zeroed units hardly at all."""
    job = make_job()
    soft = {name: mask * 0.7 for name, mask in masks(job, Kind.CHANNEL, 40).items()}
    job = job.without(soft, "rounds")
    first = job.records["rounds"]["masked_minus_smaller_max_abs"]
    job = job.without(masks(job, Kind.CHANNEL, 40), "rounds")
    assert job.records["rounds"]["masked_minus_smaller_max_abs"] == first > 0
