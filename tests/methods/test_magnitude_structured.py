"""Structured magnitude pruning: the smallest units of every layer go, and no data is needed."""

from dataclasses import replace

import pytest
import torch

from compresso.methods.magnitude_structured import MagnitudeStructured
from tests.methods.conftest import MakeJob


def test_it_needs_no_data_and_keeps_equal_counts_in_every_layer(make_job: MakeJob) -> None:
    job = MagnitudeStructured(keep=0.6)(replace(make_job(), rows=[], held=[]))
    shapes = set(job.arch.shapes(job.model))
    assert len(shapes) == 1
    before = make_job().cost()().parameters()["blocks"]
    assert job.cost()().parameters()["blocks"] / before == pytest.approx(0.6, abs=0.02)


def test_the_smallest_units_go(make_job: MakeJob) -> None:
    job = make_job()
    with torch.no_grad():
        for name in ("gate_proj.weight", "up_proj.weight"):
            job.model.get_parameter(f"model.layers.2.mlp.{name}")[7] *= 1e-3
        job.model.get_parameter("model.layers.2.mlp.down_proj.weight")[:, 7] *= 1e-3
    plan = MagnitudeStructured(keep=0.95, kinds=("channel",))(job).plan  # type: ignore[arg-type]
    assert 7 not in plan.kept["layers.2.channels"]
