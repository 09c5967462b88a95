"""OWL: shares follow outliers measured on the dense model. The arithmetic of sharing out is tested in
tests/core/test_sparsity.py.
"""

import pytest
import torch
from pydantic import ValidationError

from compresso.core.sparsity import count_of
from compresso.job import Job
from compresso.methods.owl import Owl
from tests.methods.conftest import MakeJob


def with_outliers(job: Job) -> Job:
    """Layer 1 gets a few weights that stand out."""
    for name, parameter in job.model.named_parameters():
        if name.startswith("model.layers.1.") and parameter.dim() == 2:
            parameter.data[:, 0] *= 40
    return job


@pytest.mark.parametrize("base", ["wanda", "sparsegpt"])
def test_the_block_with_outliers_keeps_most(make_job: MakeJob, base: str) -> None:
    job = Owl(sparsity=0.7, base=base)(with_outliers(make_job()))  # type: ignore[arg-type]
    facts = job.records["owl"]
    shares = facts["shares"]
    assert max(facts["outliers_percent"], key=facts["outliers_percent"].get) == "1" == min(shares, key=shares.get)
    assert sum(shares.values()) / 3 == pytest.approx(0.7)
    assert max(shares.values()) - min(shares.values()) == pytest.approx(0.16)
    for layer, share in shares.items():
        weight = job.model.get_parameter(f"model.layers.{layer}.mlp.up_proj.weight")
        if base == "wanda":
            assert set((weight == 0).sum(dim=1).tolist()) == {count_of(share, weight.shape[1])}
        else:
            assert int((weight == 0).sum()) == count_of(share, weight.numel())
    assert facts["sparsity"] == pytest.approx(0.7, abs=0.03)


def test_the_first_look_changes_nothing(make_job: MakeJob) -> None:
    job = make_job()
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    stage = Owl()
    first = stage._outlying(job, stage.check(job.model, job.arch))
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.model.state_dict().items())
    assert first == stage._outlying(job, stage.check(job.model, job.arch))


def test_a_spread_that_could_empty_a_block_is_refused() -> None:
    with pytest.raises(ValidationError, match="could zero whole blocks"):
        Owl(sparsity=0.9, spread=0.08)
