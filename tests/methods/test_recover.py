"""LoRA recovery: it lowers the loss of a damaged model, keeps its shapes, and leaves no adapter behind."""

import pytest
import torch

from compresso.methods.magnitude_structured import MagnitudeStructured
from compresso.methods.recover import Recover
from compresso.metrics.held import held_loss
from tests.methods.conftest import MakeJob


def test_recovery_lowers_the_loss_and_keeps_the_shapes(make_job: MakeJob) -> None:
    damaged = MagnitudeStructured(keep=0.6)(make_job())
    before, shapes = held_loss(damaged.model, damaged.held).mean, damaged.arch.shapes(damaged.model)
    job = Recover(steps=40, batch=8, micro_batch=8, lr=1e-2)(damaged)
    after = held_loss(job.model, job.held).mean
    assert after < before - 0.5
    assert job.arch.shapes(job.model) == shapes
    assert not any("lora" in name for name, _ in job.model.named_parameters())
    assert job.records["recover"]["updates"] == 40


def test_only_targets_move(make_job: MakeJob) -> None:
    job = make_job()
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    after = Recover(steps=3, batch=4, micro_batch=4, lr=1e-2, targets=("q_proj", "v_proj"))(job)
    moved = {name for name, p in after.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"model.layers.{i}.self_attn.{t}.weight" for i in range(3) for t in ("q_proj", "v_proj")}


@pytest.mark.parametrize(("steps", "cap", "done"), [(10, 4, 4), ("1 epoch", None, 9), ("1 epoch", 100, 9)])
def test_length_in_updates_or_epochs_with_a_cap(
    make_job: MakeJob, steps: int | str, cap: int | None, done: int
) -> None:
    job = Recover(steps=steps, batch=4, micro_batch=4, max_steps=cap)(make_job())
    assert job.records["recover"]["updates"] == done


def test_accumulation_gives_the_same_adapter(make_job: MakeJob) -> None:
    whole, parts = (Recover(steps=3, batch=4, micro_batch=m, lr=1e-2)(make_job(folder=str(m))) for m in (4, 2))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), parts.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)
