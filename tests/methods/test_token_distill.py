"""ZipLM's distillation: the token loss is the mean over layers against transformers' own hidden states, a layer is
compared with the one that it was, padding does not count, and the dense model itself has nothing to learn.
"""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compresso.job import Job
from compresso.methods.drop_layers import DropLayers
from compresso.methods.gate_taylor import GateTaylor
from compresso.methods.token_distill import TokenDistill
from compresso.training.order import Micro
from tests.methods.conftest import MakeJob
from tests.methods.test_distill import from_dense

CONTRACT = {"steps": 4, "batch": 8, "micro_batch": 8, "lr": 1e-2}


def smaller(job: Job, **knobs: Any) -> Job:
    return GateTaylor(**{"keep": 0.6, "batches": 1, "batch": 8, "micro_batch": 8, **knobs})(job)


def losses(job: Job, batch: dict[str, Tensor], **knobs: Any) -> dict[str, Tensor]:
    assert job.original is not None
    teacher = job.original(torch.float32, torch.device("cpu"))
    stage = TokenDistill(**knobs)
    objective = stage._objective(job, job.model, teacher)  # pyright: ignore[reportPrivateUsage]
    return {name: value.detach() for name, value in objective(batch, Micro(0, 0, range(4))).items()}


@pytest.mark.parametrize("norm", ["none", "global"])
def test_the_token_loss_is_the_mean_over_layers_that_are_left(make_job: MakeJob, norm: str) -> None:
    """Against transformers' own hidden states: the first is compared with the first, the last, behind the final norm,
    with the last.
    """
    job = DropLayers(drop=1, score="reverse")(smaller(make_job()))
    assert job.plan.kept["layers"] == (0, 1) and job.original is not None
    batch = job.collated(job.rows[:4])
    dense = job.original(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        ours, theirs = (
            one(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1:] for one in (job.model, dense)
        )
        pairs = ((ours[0], theirs[0]), (ours[1], theirs[2]))
        relative = [1.0 if norm == "none" else float(b.square().mean() + 2**-7) for _, b in pairs]
        terms = [float((a - b).square().mean()) / scale for (a, b), scale in zip(pairs, relative, strict=True)]
    found = losses(job, batch, norm=norm, kl_weight=0.0, token_weight=0.5)
    assert float(found["loss"]) == pytest.approx(0.5 * sum(terms) / 2, rel=1e-4)


def test_terms_are_those_of_transformers_where_all_layers_are_left(make_job: MakeJob) -> None:
    job = smaller(make_job())
    assert job.original is not None
    batch = job.collated(job.rows[:4])
    dense = job.original(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        ours, theirs = (
            one(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1:] for one in (job.model, dense)
        )
        mean = sum(float((a - b).square().mean()) for a, b in zip(ours, theirs, strict=True)) / 3
        label = float(job.model(**batch).loss)
    found = losses(job, batch, norm="none", hard_weight=2.0, kl_weight=0.0, token_weight=0.5)
    assert float(found["loss"]) == pytest.approx(2 * label + 0.5 * mean, rel=1e-5)


def test_padding_does_not_count_and_the_dense_model_has_nothing_to_learn(make_job: MakeJob) -> None:
    job = smaller(make_job())
    rows = [{name: values[:6] for name, values in row.items()} for row in job.rows[:2]]
    short = job.collated(rows)
    padded = job.collated([*rows, job.rows[2]])
    padded = {name: tensor[:2] for name, tensor in padded.items()}
    assert padded["input_ids"].shape[1] > short["input_ids"].shape[1]
    one, other = (losses(job, batch, norm="none") for batch in (short, padded))
    for name in ("loss", "features", "divergence"):
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4)
    nothing = losses(make_job(folder="other"), short)
    assert float(nothing["features"]) == 0 and float(nothing["loss"]) == pytest.approx(0, abs=1e-6)


def test_the_model_comes_nearer_to_dense_and_is_left_frozen(make_job: MakeJob) -> None:
    job = smaller(make_job())
    before = from_dense(job)
    after = TokenDistill(steps=40, batch=8, micro_batch=8, lr=3e-3)(job)
    assert from_dense(after) < 0.7 * before
    assert after.records["token_distill"]["updates"] == 40
    assert not any(parameter.requires_grad for parameter in after.model.parameters())


def test_a_loss_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValidationError, match="ask nothing of the dense model"):
        TokenDistill(kl_weight=0.0, token_weight=0.0)
