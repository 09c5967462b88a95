"""LoRA on one factor, then on the other, behind svd: ranks stay, and each half moves its factor alone."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compresso.core.low_rank import rank_within, truncated
from compresso.edit.factors import factor_, multiply_out_
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.methods.recover import Recover
from compresso.methods.svd import Svd
from compresso.metrics.held import held_loss
from compresso.runner.recipe import build
from tests.methods.conftest import MakeJob

KNOBS = {"train": "factors", "batch": 8, "micro_batch": 8, "lr": 1e-2, "rank": 4}


def low(make_job: MakeJob, folder: str = "work") -> Job:
    """A job behind svd; the stage after it has a folder of its own."""
    job = Svd(keep=0.4)(make_job(folder=f"svd {folder}"))
    return replace(job, out=job.out.with_name(folder))


def weights(job: Job) -> dict[str, Tensor]:
    return {name: job.model.get_submodule(name).weight.detach().double() for name in job.records["svd"]["ranks"]}


def test_factors_and_back_change_nothing_but_rounding(make_job: MakeJob) -> None:
    job = low(make_job)
    ids = torch.arange(1, 13).unsqueeze(0)
    before, names = copy.deepcopy(job.model), job.records["svd"]["ranks"]
    factor_(job.model, names)
    with torch.no_grad():
        torch.testing.assert_close(job.model(input_ids=ids).logits, before(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    multiply_out_(job.model, names)
    assert job.model.state_dict().keys() == before.state_dict().keys()
    for name, tensor in job.model.state_dict().items():
        torch.testing.assert_close(tensor, before.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_it_recovers_within_the_ranks_that_svd_left(make_job: MakeJob) -> None:
    job = low(make_job)
    before, kept = held_loss(job.model, job.held).mean, weights(job)
    done = Recover(steps=30, **KNOBS)(job)
    assert held_loss(done.model, done.held).mean < before - 0.2
    for name, weight in weights(done).items():
        assert (
            rank_within(torch.linalg.svdvals(weight), torch.finfo(torch.float32).eps)
            <= job.records["svd"]["ranks"][name]
        )
        assert not torch.allclose(weight, kept[name], atol=1e-4)
    assert done.records["recover"]["factors"] == len(kept)
    assert not any("lora" in name or "left" in name for name, _ in done.model.named_modules())


def test_the_left_factor_learns_first_and_then_stands_still(make_job: MakeJob) -> None:
    """Rows of a product lie in the span of its right factor, columns in that of its left one: which moved is seen."""
    moved: dict[int, dict[str, bool]] = {}
    job = low(make_job)
    (name, dense), *_ = [item for item in weights(job).items() if "up_proj" in item[0]]
    factors = truncated(dense, job.records["svd"]["ranks"][name])
    rows, columns = torch.linalg.qr(factors.right.T)[0], torch.linalg.qr(factors.left)[0]
    for steps in (1, 2):  # one update: of the left factors alone; two: one of each
        weight = weights(Recover(steps=steps, **KNOBS)(low(make_job, folder=f"{steps} steps")))[name]
        change = weight - dense
        assert change.norm() > 1e-3
        moved[steps] = {
            "left": bool((weight - columns @ columns.T @ weight).norm() > 1e-4),
            "right": bool((weight - weight @ rows @ rows.T).norm() > 1e-4),
        }
    assert moved == {1: {"left": True, "right": False}, 2: {"left": True, "right": True}}


def test_killed_in_either_half_it_goes_on_to_the_same_weights(make_job: MakeJob) -> None:
    whole = Recover(steps=4, save_every=1, **KNOBS)(low(make_job, folder="whole"))
    kept = sorted(path for path in whole.out.iterdir() if path.is_dir())
    assert len(kept) == 2  # the newest two: the one in the second half is gone on from
    stopped = low(make_job, folder="stopped")
    shutil.copytree(kept[0], stopped.out / kept[0].name)
    resumed = Recover(steps=4, save_every=1, **KNOBS)(stopped)
    for name, weight in weights(resumed).items():
        torch.testing.assert_close(weight, weights(whole)[name], atol=1e-7, rtol=0)


def test_what_has_no_factors_is_refused(make_job: MakeJob) -> None:
    with pytest.raises(RecipeError, match="tunes what svd left with a low rank, and of q_proj it left none; put svd"):
        Recover(steps=1, targets=("q_proj",), **KNOBS)(make_job())
    job = low(make_job)
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        job.model.get_submodule(name).weight.add_(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(
        RecipeError, match=r"up_proj has rank 32, and svd left it with \d+: a stage between them changed"
    ):
        Recover(steps=1, **KNOBS)(job)
    with pytest.raises(ValueError, match="adapters of factors fit no linear of the result; leave save_adapter out"):
        Recover(steps=1, save_adapter=True, **KNOBS)


def test_factors_without_svd_before_them_are_refused_before_weights_are_read() -> None:
    recover = {"recover": {"steps": 1, **KNOBS}}
    for stages in ([recover], [recover, {"svd": {}}]):
        with pytest.raises(RecipeError, match=r"stage 'recover': train: factors .*; put svd before it, or give train"):
            build({"stages": stages})
    assert build({"stages": [{"svd": {}}, recover]}).stages[1][0] == "recover"
