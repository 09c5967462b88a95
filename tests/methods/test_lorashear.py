"""LoRAShear: what is planted dead leaves first, unprunable axes keep their width, and the result is on its budget."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from compresso.core.axis import Kind
from compresso.errors import CompressoError, RecipeError
from compresso.job import Job
from compresso.methods.lorashear import LoraShear
from compresso.runner.recipe import build
from tests.methods.conftest import MakeJob

QUICK: dict[str, Any] = {
    "tune": 1,
    "shrink": 6,
    "periods": 2,
    "batches": 1,
    "batch": 4,
    "micro_batch": 4,
    "rank": 2,
    "lr": 1e-2,
}


def shear(job: Job, **knobs: Any) -> Job:
    return LoraShear(**{**QUICK, **knobs})(job)


def blocks(job: Job) -> int:
    return job.cost()().parameters()["blocks"]


@pytest.mark.parametrize(
    "knobs", [{}, {"kinds": ("channel",), "keep": 0.75}, {"kinds": ("head",), "keep": 0.75}, {"unprunable": 0.4}]
)
def test_block_parameters_land_on_the_target_and_zero_means_gone(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    knobs = {"keep": 0.6, **knobs}
    job = shear(make_job(), **knobs)
    unit = 3 * 32 if knobs.get("kinds") != ("head",) else 32 * 8 * 6
    wanted = knobs["keep"] * blocks(make_job())
    assert wanted - unit < blocks(job) <= wanted
    record = job.records["lorashear"]
    assert record["curve"]["at_zero"][-1] == sum(
        int(b) - int(a) for a, b in (kept.split("/") for kept in record["units_kept"].values())
    )
    assert record["masked_minus_smaller_max_abs"] < 1e-4


def test_layouts_multiples_and_floors_hold(make_job: MakeJob) -> None:
    uniform = shear(make_job(folder="u"), keep=0.6, layout="uniform", unprunable=0)
    assert len({(shape.kv_heads, shape.channels) for shape in uniform.arch.shapes(uniform.model)}) == 1
    rounded = shear(make_job(folder="m"), keep=0.6, multiple_of={"channel": 8}, floor={"head": 2, "channel": 16})
    assert all(
        shape.channels % 8 == 0 and shape.channels >= 16 and shape.kv_heads >= 2
        for shape in rounded.arch.shapes(rounded.model)
    )
    assert blocks(rounded) == pytest.approx(
        0.6 * blocks(make_job(folder="d")), rel=0.02
    )  # half a multiple in each layer


def test_planted_dead_units_leave_first(make_job: MakeJob) -> None:
    """10 of 48 channels in each layer carry nothing; a budget of exactly so many removes these and no other, in both
    periods.
    """
    job = make_job()
    dead = list(range(5, 15))
    with torch.no_grad():
        for layer in job.arch.blocks(job.model):
            layer.mlp.gate_proj.weight[dead] *= 1e-4
            layer.mlp.up_proj.weight[dead] *= 1e-4
            layer.mlp.down_proj.weight[:, dead] *= 1e-4
    keep = 1 - 30 * 3 * 32 / blocks(job)
    after = shear(job, keep=keep, kinds=("channel",), unprunable=0, lr=1e-4)
    alive = tuple(unit for unit in range(48) if unit not in dead)
    assert dict(after.plan.kept) == {f"layers.{i}.channels": alive for i in range(3)}


def test_axes_whose_loss_harms_most_keep_their_width(make_job: MakeJob) -> None:
    """Layer 1's FFN writes loudly, so that half of it is missed; layer 0's heads write nothing at all."""
    job = make_job()
    with torch.no_grad():
        job.model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(30)
        job.model.get_parameter("model.layers.0.self_attn.o_proj.weight").zero_()
    after = shear(job, keep=0.6, unprunable=0.34)
    record = after.records["lorashear"]
    assert len(record["unprunable"]) == 2
    harm = record["loss_when_probed"]
    assert min(harm[name] for name in record["unprunable"]) >= max(
        loss for name, loss in harm.items() if name not in record["unprunable"]
    )
    for name in record["unprunable"]:
        assert name not in after.plan.kept


def test_keeping_everything_changes_no_bit(make_job: MakeJob) -> None:
    before = {name: tensor.clone() for name, tensor in make_job().model.state_dict().items()}
    after = LoraShear(keep=1.0)(make_job()).model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4, 6])
def test_it_goes_on_where_it_was_interrupted(make_job: MakeJob, step: int) -> None:
    """Before the first choice, between two factors of a period, and in the second one."""
    knobs = {"save_every": 1, "dropout": 0.1, "keep": 0.6, "max_steps": None, "half_space": 0.2}
    whole = shear(make_job(folder="whole"), **knobs)
    # only the newest checkpoints are kept: run once more up to there
    cut = make_job(folder="cut")
    stopped = make_job(folder="stopped")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(stopped, step, knobs)
    shutil.copytree(stopped.out / f"step-{step:06d}", cut.out / f"step-{step:06d}")
    resumed = shear(cut, **knobs)
    assert resumed.records["lorashear"] == whole.records["lorashear"]
    assert resumed.plan == whole.plan
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def _interrupted(job: Job, step: int, knobs: dict[str, Any]) -> None:
    """Stop in the update after `step`."""
    from compresso.training.shrinking import ShrinkingObjective

    shrink = ShrinkingObjective.shrink_

    def stops(self: ShrinkingObjective, update: int) -> dict[str, float]:
        if update == step:
            raise KeyboardInterrupt
        return shrink(self, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShrinkingObjective, "shrink_", stops)
        shear(job, **knobs)


def test_training_helps_survivors(make_job: MakeJob) -> None:
    """The loss after shrinking with a learning rate is below that of the same removals without."""
    from compresso.metrics.held import held_loss

    trained, idle = (shear(make_job(folder=str(lr)), keep=0.7, lr=lr, shrink=40, unprunable=0) for lr in (1e-2, 0.0))
    assert held_loss(trained.model, trained.held).mean < held_loss(idle.model, idle.held).mean


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"layout": "uniform"}, "unprunable=0.1 keeps some layers wider than layout='uniform' allows; set it to 0"),
        ({"kinds": ["hidden"]}, "only heads and channels shrink"),
        ({"criteria": {"first": 0.0}}, "score nothing; give at least one"),
        ({"criteria": {"fist": 1.0}}, "criteria"),
        ({"half_space": 1.0}, "half_space"),
    ],
)
def test_knobs_that_cannot_work_are_refused_with_the_cure(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        build({"name": "x", "stages": [{"lorashear": knobs}]}, "x")


def test_an_unprunable_share_that_is_too_large_is_named_before_weights_are_read(make_job: MakeJob) -> None:
    job = make_job()
    axes = job.arch.axes(job.model)
    with pytest.raises(CompressoError, match=r"unprunable=0.5 keeps 3 of 6 axes whole: lower it or raise keep"):
        LoraShear(keep=0.1, unprunable=0.5).dry_run_plan(axes, job.cost())
    with pytest.raises(ValueError, match="floor"):
        LoraShear(keep=0.1, unprunable=0.5, floor={Kind.CHANNEL: 40}).dry_run_plan(axes, job.cost())
    assert job.cost().of(LoraShear(keep=0.5).dry_run_plan(axes, job.cost())).parameters()["blocks"] <= 0.5 * blocks(job)


def test_too_few_updates_to_shrink_in_are_refused(make_job: MakeJob) -> None:
    with pytest.raises(RecipeError, match="1 update is left to shrink in, at least 2 are needed"):
        shear(replace(make_job()), tune=2, shrink=4, hold=2, max_steps=3)
