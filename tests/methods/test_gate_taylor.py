"""Gate-Taylor removal: what it keeps is what its scores say, one pool over kinds and layers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.score import parameters_per_unit
from compresso.job import Job
from compresso.methods.drop_layers import DropLayers
from compresso.methods.gate_taylor import GateTaylor
from compresso.methods.learn_gates import LearnGates
from compresso.observe.gate_taylor import gate_taylor, sensitivity_per_cost
from compresso.solve.allocate import allocate
from compresso.stage import Stage
from tests.methods.conftest import MakeJob

SCORED: dict[str, Any] = {
    "keep": 0.8,
    "kinds": ("head", "channel"),
    "tune": 0,
    "ramp": 0,
    "hold": 2,
    "constraint": "projection",
    "start": "score",
    "score_batches": 1,
    "batch": 4,
    "micro_batch": 4,
    "rank": 2,
}


def scored(job: Job, axes: Sequence[Axis], batches: int, batch: int, micro_batch: int) -> dict[str, torch.Tensor]:
    """As the stage scores."""
    source = job.batches(batch, "gate_taylor")
    parts = [range(start, min(start + micro_batch, batch)) for start in range(0, batch, micro_batch)]
    given = [source.at(update, part) for update in range(batches) for part in parts]
    return sensitivity_per_cost(job.model, axes, job.cost(), given)


def test_kept_units_score_above_removed_ones_of_the_same_kind_and_price(make_job: MakeJob) -> None:
    job = make_job()
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind == "channel"]
    scores = scored(job, axes, 2, 4, 4)
    plan = GateTaylor(keep=0.8, kinds=("channel",), batches=2, batch=4)(make_job(folder="b")).plan  # type: ignore[arg-type]
    masks = plan.masks(axes)
    kept = torch.cat([scores[a.name][masks[a.name] > 0] for a in axes])
    removed = torch.cat([scores[a.name][masks[a.name] == 0] for a in axes])
    assert len(removed) > 10
    assert kept.min() >= removed.max()


@pytest.mark.parametrize("keep", [0.4, 0.7])
def test_it_lands_on_the_budget(make_job: MakeJob, keep: float) -> None:
    before = make_job().cost()().parameters()["blocks"]
    job = GateTaylor(keep=keep, batches=1, batch=4)(make_job())
    assert keep * before - 3 * 32 < job.cost()().parameters()["blocks"] <= keep * before


@pytest.mark.parametrize("allocation", ["per_layer", "sensitivity", "exact"])
def test_every_allocation_lands_within_the_budget(make_job: MakeJob, allocation: str) -> None:
    before = make_job().cost()().parameters()["blocks"]
    job = GateTaylor(keep=0.6, allocation=allocation, batches=1, batch=4)(make_job())  # type: ignore[arg-type]
    assert 0.56 * before < job.cost()().parameters()["blocks"] <= 0.6 * before


def test_a_cache_budget_is_met_by_heads(make_job: MakeJob) -> None:
    before = make_job().cost()()
    after = GateTaylor(keep=0.5, of="kv", batches=1, batch=4)(make_job()).cost()()
    assert float(after.cached) <= 0.5 * float(before.cached)


def test_a_channel_that_does_nothing_goes_first(make_job: MakeJob) -> None:
    job = make_job()
    with torch.no_grad():
        job.model.get_parameter("model.layers.1.mlp.down_proj.weight")[:, 5] = 0
    plan = GateTaylor(keep=0.99, kinds=("channel",), batches=1, batch=4)(job).plan  # type: ignore[arg-type]
    assert 5 not in plan.kept["layers.1.channels"]


def test_uniform_layout_keeps_equal_counts(make_job: MakeJob) -> None:
    job = GateTaylor(keep=0.6, layout="uniform", batches=1, batch=4)(make_job())
    assert len(set(job.arch.shapes(job.model))) == 1


def test_less_is_lost_than_by_removing_the_best_units(make_job: MakeJob) -> None:
    """The scores mean something: cutting the other end of the ranking hurts more."""
    from compresso.metrics.held import held_loss
    from compresso.solve.allocate import allocate

    job = make_job()
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind in ("head", "channel")]
    scores = scored(job, axes, 4, 8, 4)
    stage = GateTaylor(keep=0.7)
    good, bad = (
        make_job().without(
            allocate(axes, {n: sign * s for n, s in scores.items()}, job.cost(), stage.budget()).masks(axes), "x"
        )
        for sign in (1, -1)
    )
    assert held_loss(good.model, good.held).mean < held_loss(bad.model, bad.held).mean


def test_scores_do_not_depend_on_the_micro_batch(make_job: MakeJob) -> None:
    job = make_job()
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind == "channel"]
    whole, parts = (scored(job, axes, 2, 4, micro_batch) for micro_batch in (4, 3))
    for name, score in whole.items():
        torch.testing.assert_close(score, parts[name], rtol=1e-4, atol=1e-12)


def test_scores_are_worth_what_the_budget_counts(make_job: MakeJob) -> None:
    """A hidden dimension takes more of all parameters, embeddings among them, than of the blocks alone."""
    job = make_job()
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind in ("channel", "hidden")]
    source = job.batches(4, "gate_taylor")
    given = [source.at(0, range(4))]
    raw = gate_taylor(job.model, axes, given)
    for of in ("blocks", "total", "macs"):
        price = parameters_per_unit(axes, job.cost(), of)
        scores = {name: score / price[name] for name, score in raw.items()}
        wanted = allocate(axes, scores, job.cost(), Budget(0.8, of, (Kind.CHANNEL, Kind.HIDDEN)))
        stage = GateTaylor(keep=0.8, of=of, kinds=("channel", "hidden"), batches=1, batch=4)  # type: ignore[call-arg]
        assert stage(make_job(folder=of)).plan == wanted
    assert len({parameters_per_unit(axes, job.cost(), of)["hidden"] for of in ("blocks", "total", "macs")}) == 3


@pytest.mark.parametrize("allocation", ["global", "per_layer", "sensitivity", "exact"])
def test_what_takes_nothing_of_the_count_stays(make_job: MakeJob, allocation: str) -> None:
    """FFN units hold nothing of a cache, so that no share of one is won by removing them."""
    knobs: dict[str, Any] = {"keep": 0.5, "of": "kv", "allocation": allocation, "batches": 1, "batch": 4}
    job = GateTaylor(**knobs)(make_job())
    assert [shape.channels for shape in job.arch.shapes(job.model)] == [48, 48, 48]
    assert float(job.cost()().cached) == 0.5 * float(make_job(folder="dense").cost()().cached)


@pytest.mark.parametrize(
    "stage", [GateTaylor(keep=0.8, batches=1, batch=4), LearnGates(**SCORED)], ids=["score", "gates"]
)  # type: ignore[call-arg]
def test_a_layer_without_attention_is_scored_like_the_others(make_job: MakeJob, stage: Stage) -> None:
    job = DropLayers(drop=1, kinds=(Kind.ATTENTION,), score="reverse")(make_job())  # type: ignore[call-arg]
    before = job.cost()().parameters()["blocks"]
    after = stage(job)
    assert after.cost()().parameters()["blocks"] <= 0.8 * before
    assert [shape.kv_heads > 0 for shape in after.arch.shapes(after.model)] == [True, True, False]
