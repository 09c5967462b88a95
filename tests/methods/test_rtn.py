"""Rounding to nearest on whole models: the grid's values, where asked and nowhere else. Grids are tested in
tests/core/test_rounding.py.
"""

import io
from typing import Any

import pytest
import torch

from compresso.core.rounding import fit
from compresso.errors import NumericError, RecipeError
from compresso.job import Job
from compresso.methods import rtn
from compresso.methods.rtn import Rtn
from compresso.sweep.targets import Where, names_of
from compresso.training.progress import Progress
from tests.methods.conftest import MakeJob

FIRST = Where(layers=(0, 1), modules=("*.self_attn.[qkv]_proj",))


@pytest.mark.parametrize("knobs", [{}, {"group": 16}, {"symmetric": True}, {"clip": True, "group": 8}])
def test_chosen_weights_are_the_grid_s_and_all_others_as_they_were(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    dense = make_job().model.state_dict()
    job = Rtn(bits=4, where=FIRST, **knobs)(make_job())
    for name, tensor in job.model.state_dict().items():
        if name.startswith("model.layers.0.self_attn") and "o_proj" not in name:
            assert torch.equal(tensor, fit(dense[name], 4, **knobs).round(dense[name]))
        else:
            assert torch.equal(tensor, dense[name])


def test_a_long_rounding_says_how_far_it_is(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(rtn, "PATIENCE", 0.0)
    monkeypatch.setattr(Job, "progress", lambda _: Progress("lines", seconds=0, stream=shown))
    names = names_of(Rtn(where=FIRST).check(make_job().model, make_job().arch))
    Rtn(where=FIRST)(make_job())
    assert [line.split("  ")[:2] for line in shown.getvalue().splitlines()] == [
        ["rtn", f"{done}/{len(names)}"] for done in range(1, len(names) + 1)
    ]


def test_bits_count_scales_and_zero_points(make_job: MakeJob) -> None:
    assert Rtn(bits=4, group=16, where=FIRST)(make_job()).records["rtn"]["bits"] == 4 + (16 + 4) / 16
    assert Rtn(bits=4, group=16, symmetric=True, where=FIRST)(make_job()).records["rtn"]["bits"] == 4 + 16 / 16


def test_rounding_again_changes_nothing(make_job: MakeJob) -> None:
    once = Rtn(bits=3, group=8)(make_job())
    values = {name: tensor.clone() for name, tensor in once.model.state_dict().items()}
    twice = Rtn(bits=3, group=8)(once)
    for name, tensor in twice.model.state_dict().items():
        torch.testing.assert_close(tensor, values[name], atol=1e-7, rtol=1e-6)


def test_what_cannot_be_rounded_is_refused(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(RecipeError, match=r"q_proj has 32 inputs, no multiple of 24"):
        Rtn(group=24).check(job.model, job.arch)
    with torch.no_grad():
        job.model.get_parameter("model.layers.1.mlp.up_proj.weight")[2, 3] = float("nan")
    with pytest.raises(NumericError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        Rtn()(job)
