"""SparseGPT on whole models. Its mathematics is tested in tests/core/test_obs.py. Oracle: weights of the authors' code,
see `oracles`.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from compresso.core.obs import NotPositiveDefiniteError
from compresso.core.sparsity import lowest_share
from compresso.errors import NumericError
from compresso.job import Job
from compresso.methods.magnitude import Magnitude
from compresso.methods.sparsegpt import SparseGpt
from compresso.methods.wanda import Wanda
from compresso.observe.folds import Stats
from compresso.sweep.calibration import Calibration
from compresso.sweep.one_shot import compensated
from compresso.sweep.targets import Group, Where
from tests.methods.conftest import MakeJob
from tests.methods.oracles import check_weights, needs_oracles, oracle_job, perplexity


@needs_oracles
@pytest.mark.parametrize(
    ("file", "knobs", "loss"),
    [
        ("sparsegpt50", {"compat": "reference"}, 4.011920073),
        ("sparsegpt24", {"pattern": "2:4"}, 4.041302764),
        ("sparsegpt50_4bit", {"compat": "reference", "bits": 4}, 4.016308098),
    ],
)
def test_the_authors_weights(tmp_path: Path, file: str, knobs: dict[str, Any], loss: float) -> None:
    job = SparseGpt(**knobs, calibration=Calibration(batch=4))(oracle_job(tmp_path))
    check_weights(job, file)
    assert perplexity(job) == pytest.approx(loss, rel=1e-4)


@torch.no_grad()
def divergence(dense: Job, pruned: Job) -> float:
    """KL from the dense model on the held-out examples, nats a token."""
    ids = torch.tensor([row["input_ids"] for row in dense.held])
    logits = [log_softmax(job.model(input_ids=ids).logits, dim=-1) for job in (dense, pruned)]
    return float(kl_div(logits[1], logits[0], log_target=True, reduction="none").sum(dim=-1).mean())


def noisy(job: Job, seed: int) -> Job:
    """Other weights, and input channels of unequal size, as trained models have."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in job.model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        elif "layernorm" in name:
            parameter.data.copy_(torch.randn(len(parameter), generator=generator).exp())
    return job


def test_the_reported_loss_is_the_mean_squared_error_of_the_outputs_a_token() -> None:
    """With H = 2 / n X^T X, half of tr(D H D^T) is the error itself; damping adds its share of H's mean diagonal."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 16, generator=generator) * torch.randn(16, generator=generator).exp()
    model = nn.ModuleDict(
        {name: nn.Linear(16, out, bias=False) for name, out in (("one", 6), ("other", 3))}
    ).requires_grad_(False)
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    edit = compensated(model, choose=lambda _, scores: lowest_share(scores, 0.5), every=16)
    notes = edit(Group(0, ("one", "other")), Stats(inputs.T @ inputs, len(inputs)))
    mean_diagonal = 2 / 50 * float(inputs.square().sum()) / 16
    for name in ("one", "other"):
        change = model.get_parameter(f"{name}.weight") - dense[f"{name}.weight"]
        error = float((inputs @ change.T).square().sum()) / 50
        assert notes[name]["loss"] == pytest.approx(
            error + 0.01 * mean_diagonal / 2 * float(change.square().sum()), rel=1e-4
        )


def test_order_of_quality(make_job: MakeJob) -> None:
    stages = (SparseGpt(sparsity=0.5), Wanda(sparsity=0.5), Magnitude(sparsity=0.5))
    totals = [0.0] * len(stages)
    for seed in range(5):
        dense = noisy(make_job(), seed)
        for i, stage in enumerate(stages):
            totals[i] += divergence(dense, stage(noisy(make_job(folder=f"{seed}-{i}"), seed)))
    assert 0 < totals[0] < totals[1] < totals[2]


def test_what_stays_moves_and_counts_are_exact(make_job: MakeJob) -> None:
    dense = make_job().model.state_dict()
    job = SparseGpt(sparsity=0.5)(make_job())
    facts = job.records["sparsegpt"]
    assert facts["sparsity"] == 0.5
    assert facts["damped_more"] == {}
    assert set(facts["loss"]) == {name.removesuffix(".weight") for name in facts["zeros"]}
    weight, before = (state["model.layers.0.mlp.up_proj.weight"] for state in (job.model.state_dict(), dense))
    kept = weight != 0
    assert float((weight - before)[kept].abs().max()) > 1e-3


def test_two_of_four_in_every_row(make_job: MakeJob) -> None:
    job = SparseGpt(pattern="2:4")(make_job())
    for name in job.records["sparsegpt"]["zeros"]:
        groups = (job.model.get_parameter(name) == 0).unflatten(1, (-1, 4)).sum(dim=2)
        assert bool((groups == 2).all()), name


def test_weights_stored_in_bfloat16_keep_their_type_and_count(make_job: MakeJob) -> None:
    job = make_job()
    job.model.to(torch.bfloat16)
    job = SparseGpt(pattern="2:4")(job)
    assert {parameter.dtype for parameter in job.model.parameters()} == {torch.bfloat16}
    assert job.records["sparsegpt"]["sparsity"] == pytest.approx(
        0.5, abs=1e-3
    )  # rounding may make a few zeros more, never fewer
    assert job.records["sparsegpt"]["sparsity"] >= 0.5


def test_joint_rounding_leaves_a_row_at_most_sixteen_values(make_job: MakeJob) -> None:
    job = SparseGpt(sparsity=0.5, bits=4)(make_job())
    for name in job.records["sparsegpt"]["zeros"]:
        assert all(len(row.unique()) <= 16 for row in job.model.get_parameter(name))
    assert job.records["sparsegpt"]["sparsity"] >= 0.5


def test_nothing_asked_is_nothing_changed(make_job: MakeJob) -> None:
    before = copy.deepcopy(make_job().model.state_dict())
    after = SparseGpt(sparsity=0)(make_job()).model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_second_moment_beyond_repair_names_its_linears(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import compresso.methods.sparsegpt as module

    monkeypatch.setattr(module, "second_moment", lambda total, inputs: -(inputs.T @ inputs))
    with pytest.raises(
        NumericError, match=r"model\.layers\.0\.self_attn\.q_proj, .*v_proj: the second moment .* raise damping"
    ):
        SparseGpt()(make_job())


def test_where_the_recipe_says_so_wanda_takes_over_and_the_records_tell(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compresso.sweep.one_shot as module

    invert = module.inverse_factor

    def refusing(moment: torch.Tensor, damping: float) -> Any:
        if len(moment) == 48:  # down_proj
            raise NotPositiveDefiniteError("the second moment of its inputs is not positive definite")
        return invert(moment, damping)

    monkeypatch.setattr(module, "inverse_factor", refusing)
    where, names = Where(layers=(0, 1), modules=("*.down_proj",)), ["model.layers.0.mlp.down_proj"]
    with pytest.raises(NumericError, match="not positive definite; give more calibration examples"):
        SparseGpt(where=where)(make_job())
    job = SparseGpt(where=where, not_invertible="wanda")(make_job(folder="other"))
    wanda = Wanda(where=where)(make_job(folder="wanda"))
    assert all(
        torch.equal(job.model.get_parameter(f"{name}.weight"), wanda.model.get_parameter(f"{name}.weight"))
        for name in names
    )
    assert list(job.records["sparsegpt"]["by_wanda"]) == names
    assert "not positive definite" in job.records["sparsegpt"]["by_wanda"][names[0]]
    everywhere = SparseGpt(pattern="2:4", not_invertible="wanda")(make_job(folder="all"))
    assert len(everywhere.records["sparsegpt"]["by_wanda"]) == 3 and everywhere.records["sparsegpt"]["sparsity"] == 0.5
    with pytest.raises(ValidationError, match="not_invertible=wanda prunes and does not round"):
        SparseGpt(bits=4, not_invertible="wanda")


def test_one_example_and_a_dead_channel_do(make_job: MakeJob) -> None:
    job = make_job()
    job.model.get_parameter("model.layers.1.post_attention_layernorm.weight").data[5] = 0
    job = SparseGpt(sparsity=0.5, calibration=Calibration(examples=1))(job)
    assert not job.model.get_parameter("model.layers.1.mlp.up_proj.weight")[:, 5].any()
    assert job.records["sparsegpt"]["calibration_examples"] == 1


def test_true_sequential_sees_the_edited_attention(make_job: MakeJob) -> None:
    plain = SparseGpt(where=Where(layers=(0, 1)))(make_job()).model
    sequential = SparseGpt(where=Where(layers=(0, 1)), calibration=Calibration(true_sequential=True))(
        make_job(folder="other")
    ).model
    first, behind = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(plain.get_parameter(first), sequential.get_parameter(first))
    assert not torch.equal(plain.get_parameter(behind), sequential.get_parameter(behind))


def test_knobs_that_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="no multiple of 4"):
        SparseGpt(pattern="2:4", block=6)
    with pytest.raises(ValidationError, match="set sparsity to null"):
        SparseGpt(pattern="2:4", sparsity=0.5)
    with pytest.raises(ValidationError):
        SparseGpt(bits=1)
