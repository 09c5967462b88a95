"""LoRAPrune: what is planted dead leaves first, masks only lose units, no weight has a gradient, and the result is on
its budget.
"""

import itertools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from compresso.arch.base import arch_for
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.methods.loraprune import LoraPrune
from compresso.training.lora_pruning import PruningObjective
from tests.methods.conftest import MakeJob

QUICK: dict[str, Any] = {
    "steps": 10,
    "every": 2,
    "batch": 4,
    "micro_batch": 4,
    "rank": 2,
    "lr": 1e-2,
    "spared": 0,
    "dropout": 0,
}


def pruned(job: Job, **knobs: Any) -> Job:
    return LoraPrune(**{**QUICK, **knobs})(job)


def blocks(job: Job) -> int:
    return job.cost()().parameters()["blocks"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs", [{}, {"scope": "global"}, {"kinds": ("channel",), "keep": 0.75}, {"spared": 0.34, "keep": 0.8}]
)
def test_block_parameters_land_on_the_target(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    knobs = {"keep": 0.6, **knobs}
    job = pruned(make_job(), **knobs)
    wanted = knobs["keep"] * blocks(make_job(folder="dense"))
    step = 3 * 32 * (1 if knobs.get("scope") == "global" else 3)  # a channel, of one layer or of all three
    assert wanted - step < blocks(job) <= wanted
    assert job.records["loraprune"]["masked_minus_smaller_max_abs"] < 1e-4


def test_layers_that_are_spared_keep_their_width_and_others_are_even(make_job: MakeJob) -> None:
    job = pruned(make_job(), keep=0.85, spared=0.34)
    assert {name.split(".")[1] for name in job.plan.kept} == {"1"}  # of three layers the first and the last are spared
    even = pruned(make_job(folder="even"), keep=0.6, layout="uniform")
    assert len({(shape.kv_heads, shape.channels) for shape in even.arch.shapes(even.model)}) == 1


def test_planted_dead_channels_leave_first(make_job: MakeJob) -> None:
    job = make_job()
    dead = list(range(5, 15))
    with torch.no_grad():
        for layer in job.arch.blocks(job.model):
            layer.mlp.gate_proj.weight[dead] *= 1e-4
            layer.mlp.up_proj.weight[dead] *= 1e-4
            layer.mlp.down_proj.weight[:, dead] *= 1e-4
    after = pruned(job, keep=1 - 30 * 3 * 32 / blocks(job), kinds=("channel",), lr=1e-4)
    alive = tuple(unit for unit in range(48) if unit not in dead)
    assert dict(after.plan.kept) == {f"layers.{i}.channels": alive for i in range(3)}


def test_no_weight_has_a_gradient_and_masks_only_lose_units(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    observe = PruningObjective.observe_

    def watched(self: PruningObjective, update: int) -> None:
        named = list(self.model.named_parameters())
        assert all(
            parameter.grad is None and not parameter.requires_grad for name, parameter in named if "lora_" not in name
        )
        assert all(parameter.grad is not None for name, parameter in named if "lora_" in name)
        observe(self, update)
        seen.append(self.mask.clone())

    monkeypatch.setattr(PruningObjective, "observe_", watched)
    pruned(make_job(), keep=0.5)
    assert len(seen) == 10
    assert all(bool((later <= earlier).all()) for earlier, later in itertools.pairwise(seen))
    left = [float(mask.mean()) for mask in seen]
    assert left[0] == 1 and len(set(left)) >= 4 and left[-1] < 0.6


@pytest.mark.parametrize("knobs", [{}, {"scope": "global"}, {"scope": "global", "multiple_of": {"channel": 8}}])
def test_units_that_are_gone_stay_gone_whatever_their_scores(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    """So the moving average need not forget them: only the mask counts."""
    job = make_job()
    stage, cost = LoraPrune(**{**QUICK, "keep": 0.5, **knobs}), job.cost()
    axes = stage.chosen(job.arch.axes(job.model))
    generator = torch.Generator().manual_seed(0)
    scores = {axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) for axis in axes}
    gone = {name: mask == 0 for name, mask in stage.plan(axes, scores, {}, cost, 0.8).masks(axes).items()}
    assert any(bool(one.any()) for one in gone.values())
    scores = {name: torch.rand(len(one), generator=generator, dtype=torch.float64) for name, one in scores.items()}
    plans = [
        stage.plan(axes, {name: torch.where(gone[name], theirs, one) for name, one in scores.items()}, gone, cost, keep)
        for keep in (0.8, 0.6, 0.5)
        for theirs in (0.0, 0.5, 100.0)
    ]
    for first in (0, 3, 6):
        assert plans[first] == plans[first + 1] == plans[first + 2]
    for plan in plans:
        assert all(not bool((mask.bool() & gone[name]).any()) for name, mask in plan.masks(axes).items())


def test_scores_do_not_depend_on_clipping_or_on_micro_batches(make_job: MakeJob) -> None:
    plans = [
        pruned(make_job(folder=str(i)), lr=0.0, **knobs).plan
        for i, knobs in enumerate(({}, {"clip": 1e-6}, {"micro_batch": 2}))
    ]
    assert plans[0] == plans[1] == plans[2]


def test_keeping_everything_changes_no_bit(make_job: MakeJob) -> None:
    before = {name: tensor.clone() for name, tensor in make_job().model.state_dict().items()}
    after = LoraPrune(keep=1.0)(make_job()).model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5, 9])
def test_it_goes_on_where_it_was_interrupted(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    knobs = {"save_every": 1, "dropout": 0.1, "keep": 0.6}
    whole = pruned(make_job(folder="whole"), **knobs)
    stopped, observe = make_job(folder="stopped"), PruningObjective.observe_

    def stops(self: PruningObjective, update: int) -> None:
        if update == step:
            raise KeyboardInterrupt
        observe(self, update)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PruningObjective, "observe_", stops)
        pruned(stopped, **knobs)
    cut = make_job(folder="cut")
    shutil.copytree(stopped.out / f"step-{step:06d}", cut.out / f"step-{step:06d}")
    resumed = pruned(cut, **knobs)
    assert resumed.plan == whole.plan
    assert resumed.records["loraprune"] == whole.records["loraprune"]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("ratio", "heads", "channels", "total"), [(0.5, 16, 5504, 3_905_163_264), (0.2, 26, 8807, 5_628_809_216)]
)
def test_the_published_sizes_of_llama_7b(ratio: float, heads: int, channels: int, total: int) -> None:
    """The spec's counts: so many heads and channels in 28 of 32 layers, dense in the first three and the last."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = arch_for(config)
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    chosen = LoraPrune(spared=0.1).chosen(axes)
    assert {axis.layer for axis in chosen} == set(range(3, 31))
    counts = {"head": heads, "channel": channels}
    plan = Plan({axis.name: tuple(range(counts[axis.kind])) for axis in chosen})
    assert int(cost.of(plan).total) == total
    share = float(cost.of(plan).blocks / cost().blocks)
    kept = LoraPrune(keep=share, spared=0.1).dry_run_plan(axes, cost).kept
    assert {len(kept[axis.name]) for axis in chosen if axis.kind == "head"} <= {heads, heads + 1, heads - 1}
    if ratio == 0.5:
        assert {name: len(units) for name, units in kept.items()} == {
            name: len(units) for name, units in plan.kept.items()
        }


def test_bad_knobs_name_the_cure(make_job: MakeJob) -> None:
    with pytest.raises(RecipeError, match=r"no linear of layers\.0\.heads has an adapter.*targets"):
        pruned(make_job(), targets=("up_proj",))
    with pytest.raises(ValueError, match="set spared to 0"):
        LoraPrune(layout="uniform")
    with pytest.raises(ValueError, match=r"warmup=0\.9 is not before done=0\.5"):
        LoraPrune(warmup=0.9, done=0.5)
    with pytest.raises(ValueError, match="only heads and channels"):
        LoraPrune(kinds=("hidden",))  # type: ignore[arg-type]
