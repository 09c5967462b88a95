"""LoRA recovery: it lowers the loss of a damaged model, keeps its shapes, and leaves no adapter behind."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from compresso.errors import RecipeError
from compresso.methods.distill import Distill
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


@pytest.mark.slow
@pytest.mark.parametrize("method", [Recover, Distill])
@pytest.mark.parametrize("train", ["lora", "all"])
def test_the_best_state_is_kept_and_overfitting_stops(
    make_job: MakeJob, tmp_path: Path, method: type[Recover] | type[Distill], train: Literal["lora", "all"]
) -> None:
    """Trained on another language than the held-out one, the loss on that rises; one evaluation later it ends."""
    tuned = Recover(steps=40, batch=8, micro_batch=8, lr=1e-2)(make_job())
    foreign = [{"input_ids": ids[::-1], "labels": ids[::-1]} for ids in (row["input_ids"] for row in tuned.rows)]
    before = held_loss(tuned.model, tuned.held).mean
    knobs = {"steps": 12, "batch": 8, "micro_batch": 8, "lr": 1e-2, "train": train}
    knobs |= {"hard_weight": 1.0} if method is Distill else {}
    spoilt, kept = (
        method(**knobs, **more)(
            replace(tuned, model=deepcopy(tuned.model), rows=foreign, out=tmp_path / str(len(more)))
        )
        for more in ({}, {"evaluations": 5, "patience": 1})
    )
    assert held_loss(spoilt.model, spoilt.held).mean > before + 0.2
    held = kept.records[method.__name__.lower()]["held"]
    assert held["update"] == [0, 3] and held["best"] == 0 and "stopped after 3 of 12 updates" in held["why"]
    assert held_loss(kept.model, kept.held).mean == pytest.approx(before, abs=1e-6)


def test_watching_a_recovery_that_helps_gives_the_same_weights(make_job: MakeJob) -> None:
    knobs = {"steps": 8, "batch": 8, "micro_batch": 8, "lr": 1e-2, "dropout": 0.1}
    alone, watched = (
        Recover(**knobs, **more)(MagnitudeStructured(keep=0.6)(make_job(folder=str(len(more)))))
        for more in ({}, {"evaluations": 3})
    )
    assert watched.records["recover"]["held"]["best"] == 8 and "held" not in alone.records["recover"]
    for (name, ours), theirs in zip(watched.model.named_parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_watching_needs_examples_and_more_than_one_look(make_job: MakeJob) -> None:
    with pytest.raises(RecipeError, match=r"evaluations=2, and no examples are held out; give data\.held"):
        Recover(steps=2, batch=4, micro_batch=4, evaluations=2)(replace(make_job(), held=[]))
    with pytest.raises(ValueError, match="evaluations=1 compares nothing; give 0, or 2 to 10"):
        Recover(evaluations=1)
