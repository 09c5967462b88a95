"""Minitron's pruning: planted dead parts leave without a trace, all layers keep equal widths, and the best candidate is
taken.
"""

import pytest
import torch
from torch import Tensor

from compresso.core.axis import Kind
from compresso.core.plan import Plan
from compresso.job import Job
from compresso.methods.minitron import Minitron
from compresso.metrics.divergence import divergence, reference
from compresso.solve.allocate import keep_best
from compresso.training.noise import mixed_seed
from tests.methods.conftest import MakeJob

QUICK = {"batches": 2, "batch": 8, "micro_batch": 8}


def logits(job: Job) -> Tensor:
    with torch.no_grad():
        return job.model(torch.arange(1, 40).unsqueeze(0), use_cache=False).logits


def units(job: Job, kind: Kind) -> dict[str, int]:
    return {axis.name: axis.size for axis in job.arch.axes(job.model) if axis.kind == kind}


@torch.no_grad()
def planted(job: Job, kind: Kind) -> Job:
    """The job with a quarter of the units of a kind (a third of the layers) doing nothing."""
    layers = job.model.get_submodule("model.layers")
    for layer in layers.children():
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        if kind == Kind.CHANNEL:
            mlp.up_proj.weight[::4] = 0  # type: ignore[union-attr, operator, index]
        if kind == Kind.HEAD:
            attention.v_proj.weight[8:16] = 0  # type: ignore[union-attr, operator, index]
        if kind == Kind.HIDDEN:
            attention.o_proj.weight[::4] = 0  # type: ignore[union-attr, operator, index]
            mlp.down_proj.weight[::4] = 0  # type: ignore[union-attr, operator, index]
    if kind == Kind.HIDDEN:
        job.model.get_parameter("model.embed_tokens.weight")[:, ::4] = 0
    if kind == Kind.LAYER:
        job.model.get_parameter("model.layers.1.self_attn.o_proj.weight").zero_()
        job.model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
    return job


@pytest.mark.parametrize("kind", [Kind.CHANNEL, Kind.HEAD, Kind.HIDDEN, Kind.LAYER])
def test_what_does_nothing_leaves_first_and_without_a_trace(make_job: MakeJob, kind: Kind) -> None:
    dense = planted(make_job(), kind)
    before, cost = logits(dense), dense.cost()
    axes = [axis for axis in dense.arch.axes(dense.model) if axis.kind == kind]
    left = {
        axis.name: tuple(i for i in range(axis.size) if (i != 1 if kind in (Kind.HEAD, Kind.LAYER) else i % 4))
        for axis in axes
    }
    keep = float(cost.of(Plan(left)).count("blocks") / cost().count("blocks"))
    job = Minitron(keep=keep, kinds=(kind,), **QUICK)(dense)  # type: ignore[arg-type]
    assert dict(job.plan.kept) == left
    torch.testing.assert_close(logits(job), before, atol=1e-4, rtol=1e-4)


def test_all_layers_keep_equal_widths_that_are_multiples(make_job: MakeJob) -> None:
    knobs = {
        "kinds": (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN, Kind.LAYER),
        "multiple_of": {Kind.CHANNEL: 8, Kind.HIDDEN: 4},
    }
    job = Minitron(keep=0.5, **knobs, **QUICK)(make_job())  # type: ignore[arg-type]
    channels, heads = set(units(job, Kind.CHANNEL).values()), set(units(job, Kind.HEAD).values())
    assert len(channels) == len(heads) == 1
    assert channels.pop() % 8 == 0
    assert units(job, Kind.HIDDEN)["hidden"] % 4 == 0
    assert 0.4 < job.records["minitron"]["kept_share_of_blocks"] <= 0.5 * 1.005


def test_scores_do_not_depend_on_how_many_examples_are_read_at_once(make_job: MakeJob) -> None:
    one, other = (
        Minitron(keep=0.6, batches=2, batch=8, micro_batch=size)(make_job(folder=str(size))) for size in (8, 1)
    )
    assert one.plan == other.plan


def test_it_keeps_more_of_the_dense_model_than_chance(make_job: MakeJob) -> None:
    """A model whose channels differ in size, as trained ones do."""

    def uneven(job: Job) -> Job:
        generator = torch.Generator().manual_seed(3)
        for i in range(3):
            with torch.no_grad():
                weight = job.model.get_parameter(f"model.layers.{i}.mlp.up_proj.weight")
                weight *= torch.randn(len(weight), 1, generator=generator).exp()
        return job

    dense = reference(uneven(make_job()).model, [row["input_ids"] for row in make_job().held], corpus="held")
    scored = Minitron(keep=0.7, kinds=(Kind.CHANNEL,), **QUICK)(uneven(make_job()))  # type: ignore[arg-type]
    counts = {Kind.CHANNEL: next(iter(units(scored, Kind.CHANNEL).values()))}
    by_chance: list[float] = []
    for seed in range(5):
        job = uneven(make_job())
        axes = [axis for axis in job.arch.axes(job.model) if axis.kind == Kind.CHANNEL]
        generator = torch.Generator().manual_seed(mixed_seed("chance", seed))
        plan = keep_best(axes, {axis.name: torch.rand(axis.size, generator=generator) for axis in axes}, counts)
        by_chance.append(divergence(job.without(plan.masks(axes), "chance").model, dense)[0].value)
    assert divergence(scored.model, dense)[0].value < 0.8 * sum(by_chance) / len(by_chance)


def test_the_candidate_with_the_lowest_loss_is_taken(make_job: MakeJob) -> None:
    job = Minitron(keep=0.6, candidates=4, candidate_batches=1, **QUICK)(make_job())  # type: ignore[arg-type]
    tried = job.records["minitron"]["candidates"]
    assert 2 <= len(tried) <= 4
    best = min(tried, key=lambda one: one["loss"])
    assert set(units(job, Kind.CHANNEL).values()) == {best["kept"]["channel"]}
    assert units(job, Kind.HIDDEN)["hidden"] == best["kept"]["hidden"]
    assert "candidates" not in Minitron(keep=0.6, **QUICK)(make_job(folder="b")).records["minitron"]  # type: ignore[arg-type]
