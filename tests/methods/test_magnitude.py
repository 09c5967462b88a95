"""Magnitude pruning: what goes is what is smallest, exactly as often as asked. Oracle: masks of Wanda's public code,
see `oracles`.
"""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from compresso.errors import NumericError
from compresso.methods.magnitude import Magnitude
from tests.methods.conftest import MakeJob
from tests.methods.oracles import check_masks, needs_oracles, oracle_job


@needs_oracles
def test_the_reference_masks(tmp_path: Path) -> None:
    job = Magnitude(compat="reference")(oracle_job(tmp_path))
    check_masks(job, "magnitude50")
    assert job.records["magnitude"]["sparsity"] == pytest.approx(0.5000348772321429)


@pytest.mark.parametrize("scope", ["matrix", "row", "global"])
def test_counts_are_exact_and_the_smallest_leave(make_job: MakeJob, scope: str) -> None:
    dense = make_job().model.state_dict()
    job = Magnitude(sparsity=0.3, scope=scope)(make_job())  # type: ignore[arg-type]
    facts = job.records["magnitude"]
    names = list(facts["zeros"])
    zeros = {name: (job.model.get_parameter(name) == 0) for name in names}
    total = sum(dense[name].numel() for name in names)
    if scope == "matrix":
        assert all(int(mask.sum()) == int(0.3 * mask.numel()) for mask in zeros.values())
        assert all(
            float(dense[name][zeros[name]].abs().max()) <= float(dense[name][~zeros[name]].abs().min())
            for name in names
        )
    elif scope == "row":
        assert all(set(mask.sum(dim=1).tolist()) == {int(0.3 * mask.shape[1] + 1e-9)} for mask in zeros.values())
    else:
        assert sum(int(mask.sum()) for mask in zeros.values()) == int(0.3 * total)
        assert max(float(dense[name][zeros[name]].abs().max()) for name in names) <= min(
            float(dense[name][~zeros[name]].abs().min()) for name in names
        )
    assert facts["sparsity"] == sum(int(mask.sum()) for mask in zeros.values()) / total
    assert all(
        torch.equal(job.model.get_parameter(name).detach(), dense[name].masked_fill(zeros[name], 0)) for name in names
    )
    assert facts["changed"] == len(names) == 21
    assert facts["meant_but_unchanged"] == []


def test_nothing_asked_is_nothing_changed_and_said_so(make_job: MakeJob) -> None:
    facts = Magnitude(sparsity=0)(make_job()).records["magnitude"]
    assert facts["changed"] == 0
    assert len(facts["meant_but_unchanged"]) == 21


def test_bad_knobs_and_weights_are_named(make_job: MakeJob) -> None:
    for sparsity in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValidationError):
            Magnitude(sparsity=sparsity)
    with pytest.raises(ValidationError, match="n kept of every m"):
        Magnitude(pattern="4:2")
    with pytest.raises(ValidationError, match="set sparsity to null"):
        Magnitude(pattern="2:4", sparsity=0.5)
    job = make_job()
    job.model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = float("nan")
    with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        Magnitude()(job)
