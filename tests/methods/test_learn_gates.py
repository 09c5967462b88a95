"""Compresso's mask training: it lands on the budget whatever the knobs, and does not repeat the published code's
mistakes.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from compresso.core import hard_concrete
from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.methods.learn_gates import LearnGates
from compresso.runner.recipe import build, read
from compresso.stage import dumped
from compresso.training.objectives import GatedObjective
from tests.methods.conftest import MakeJob

QUICK: dict[str, Any] = {"tune": 1, "ramp": 3, "hold": 2, "batch": 4, "micro_batch": 4, "rank": 2, "alpha": 2.0}
HARD: dict[str, Any] = {
    "tune": 0,
    "ramp": 0,
    "hold": 4,
    "constraint": "projection",
    "start": "score",
    "score_batches": 1,
    "noise": "example",
}


def blocks(job: Job) -> int:
    return job.cost()().parameters()["blocks"]


def widths(job: Job) -> list[tuple[int, int, int]]:
    return [(shape.query_heads, shape.kv_heads, shape.channels) for shape in job.arch.shapes(job.model)]


@pytest.mark.parametrize("keep", [0.35, 0.7])
@pytest.mark.parametrize("kinds", [("head", "channel"), ("channel",), ("head", "channel", "hidden")])
@pytest.mark.parametrize("knobs", [{}, {"finish": "hard", **HARD}, {**HARD, "finish": "soft", "start": "open"}])
def test_block_parameters_land_on_the_target(
    make_job: MakeJob, knobs: Mapping[str, Any], kinds: tuple[str, ...], keep: float
) -> None:
    """Within one unit of the smallest kind, by construction of the last step; on models of real size that is far below
    0.5 %.
    """
    job = make_job()
    if kinds == ("channel",):
        keep = max(keep, 0.65)  # attention alone is 0.57 of this model
    before = blocks(job)
    after = LearnGates(keep=keep, kinds=kinds, **{**QUICK, **knobs})(job)  # type: ignore[arg-type]
    channel = 3 * 32
    assert keep * before - channel < blocks(after) <= keep * before + channel
    record = after.records["learn_gates"]
    assert record["parameters_after"]["blocks"] == blocks(after)
    assert sum(p.numel() for p in after.model.parameters()) == record["parameters_after"]["total"]
    assert record["masked_minus_smaller_max_abs"] < 1e-4


def test_on_a_larger_model_the_landing_is_within_half_a_percent(make_job: MakeJob) -> None:
    job = make_job()
    share = blocks(LearnGates(keep=0.7, finish="hard", **{**QUICK, **HARD})(job)) / blocks(make_job())  # type: ignore[arg-type]
    assert share == pytest.approx(0.7, rel=0.005)


def test_uniform_layout_learns_equal_widths(make_job: MakeJob) -> None:
    for knobs in ({"finish": "hard", **HARD}, {"finish": "soft"}):
        job = LearnGates(keep=0.6, layout="uniform", kinds=("head", "channel"), **{**QUICK, **knobs})(
            make_job(folder=str(len(knobs)))
        )  # type: ignore[arg-type]
        assert len(set(widths(job))) == 1
        assert blocks(job) / blocks(make_job()) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("finish", ["soft", "hard"])
def test_kept_counts_are_multiples_and_the_smaller_model_is_the_masked_one(make_job: MakeJob, finish: str) -> None:
    """Re-admitted gates change the masked model too:
    it is run again with the new masks and compared with the result.
    """
    knobs = {**QUICK, "multiple_of": {"channel": 8, "hidden": 8}, "finish": finish}
    job = LearnGates(keep=0.6, **knobs)(make_job())  # type: ignore[arg-type]
    assert all(channels % 8 == 0 for _, _, channels in widths(job))
    assert job.model.config.hidden_size % 8 == 0
    assert job.records["learn_gates"]["masked_minus_smaller_max_abs"] < 1e-4


def test_base_weights_stay_frozen_and_gates_in_range(make_job: MakeJob) -> None:
    """Kept entries of a matrix without adapter equal the original's exactly; LoRA and gates moved."""
    job = make_job()
    before = job.model.get_parameter("model.layers.0.mlp.down_proj.weight").detach().clone()
    after = LearnGates(keep=0.7, kinds=("channel",), **{**QUICK, "finish": "hard", "lr": 1e-2})(job)  # type: ignore[arg-type]
    kept = list(after.plan.kept["layers.0.channels"])
    assert torch.equal(after.model.get_parameter("model.layers.0.mlp.down_proj.weight"), before[:, kept])
    assert not torch.equal(
        after.model.get_parameter("model.layers.0.self_attn.q_proj.weight"),
        make_job().model.get_parameter("model.layers.0.self_attn.q_proj.weight"),
    )


@pytest.mark.slow
def test_the_lagrangian_reaches_its_target_and_lambda2_only_grows(make_job: MakeJob) -> None:
    """Ascent on the multipliers: with a negative rate or in the descent group lambda2 would fall."""
    job = LearnGates(keep=0.6, tune=2, ramp=250, hold=150, batch=4, micro_batch=4, rank=2, alpha=2.0)(make_job())  # type: ignore[arg-type]
    curve = job.records["learn_gates"]["curve"]
    grown = [value for value in curve["lambda2"] if value is not None]
    assert all(later >= earlier for earlier, later in pairwise(grown))
    assert grown[-1] > 0
    assert curve["sparsity"][-1] == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("knobs", [{}, {"layer_gates": "layer"}, {"constraint": "projection"}])
def test_after_every_update_every_log_alpha_is_in_the_published_range(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]
) -> None:
    """Head gates start at 10, and a step of 50 throws every gate far out: both are brought back before anything reads
    them.
    """
    seen: list[Tensor] = []
    state = GatedObjective.state

    def watched(self: GatedObjective) -> dict[str, float]:
        seen.append(torch.cat([parameter.detach().clone() for parameter in self.gate_parameters()]))
        return state(self)

    monkeypatch.setattr(GatedObjective, "state", watched)
    LearnGates(keep=0.7, mask_lr=50.0, **QUICK, **knobs)(make_job())  # type: ignore[arg-type]
    assert len(seen) == QUICK["ramp"] + QUICK["hold"]
    for log_alpha in seen:
        assert log_alpha.min() >= hard_concrete.LOG_ALPHA_LOW - 1e-6
        assert log_alpha.max() <= hard_concrete.LOG_ALPHA_HIGH + 1e-6


def test_phases_count_updates_not_micro_batches(make_job: MakeJob) -> None:
    """Upstream counts its first phase in micro-batches: with accumulation, pruning starts too late. Here halving them
    changes nothing.
    """
    curves = []
    for micro_batch in (4, 2):
        knobs = {**QUICK, "micro_batch": micro_batch, "tune": 2}
        curves.append(LearnGates(keep=0.7, **knobs)(make_job(folder=f"w{micro_batch}")).records["learn_gates"]["curve"])  # type: ignore[arg-type]
    assert [value is None for value in curves[0]["sparsity"]] == [True] * 2 + [False] * 5
    assert curves[0]["sparsity"][2:] == pytest.approx(curves[1]["sparsity"][2:], abs=1e-5)
    assert curves[0]["loss"] == pytest.approx(curves[1]["loss"], abs=1e-4)


def test_same_seed_same_model_other_seed_other_noise(make_job: MakeJob) -> None:
    knobs = {**QUICK, "finish": "soft", "lr": 1e-2}
    one, again, other = (
        LearnGates(keep=0.7, **knobs)(make_job(seed=seed, folder=f"w{i}"))  # type: ignore[arg-type]
        for i, seed in enumerate((0, 0, 1))
    )
    assert one.plan == again.plan
    for (name, a), (_, b) in zip(one.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.records["learn_gates"]["curve"]["loss"] != other.records["learn_gates"]["curve"]["loss"]


def test_starting_from_scores_keeps_what_scores_keep_when_nothing_is_learned(make_job: MakeJob) -> None:
    """With rates of zero the result is gate-Taylor's own choice of units, on the same calibration batches."""
    from compresso.methods.gate_taylor import GateTaylor

    knobs = {
        **QUICK,
        **HARD,
        "lr": 0.0,
        "mask_lr": 0.0,
        "kinds": ("head", "channel"),
        "finish": "hard",
        "score_spread": 0.3,
    }
    learned = LearnGates(keep=0.6, **knobs)(make_job())  # type: ignore[arg-type]
    scored = GateTaylor(keep=0.6, kinds=("head", "channel"), batches=1, batch=4)(make_job(folder="other"))  # type: ignore[arg-type]
    assert learned.plan == scored.plan


def test_soft_masks_are_folded_not_dropped(make_job: MakeJob) -> None:
    """Thresholding soft survivors to one would change the model: the result must be the soft one."""
    job = make_job()
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind == Kind.CHANNEL]
    masks = {axis.name: torch.linspace(0, 1, axis.size) for axis in axes}
    soft = make_job().without(masks, "test")
    hard = make_job().without({name: (mask > 0).float() for name, mask in masks.items()}, "test")
    ids = torch.tensor([list(range(1, 12))])
    assert (soft.model(ids).logits - hard.model(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("layer_gates", ["layer", "sublayer"])
def test_layer_gates_train_and_land(make_job: MakeJob, layer_gates: str) -> None:
    job = LearnGates(keep=0.7, kinds=("head", "channel"), layer_gates=layer_gates, **QUICK)(make_job())  # type: ignore[arg-type]
    assert blocks(job) <= 0.7 * blocks(make_job()) + 3 * 32


def test_gradient_checkpointing_changes_nothing(make_job: MakeJob) -> None:
    plain, saving = (
        LearnGates(keep=0.7, checkpointing=checkpointing, **{**QUICK, "finish": "hard"})(
            make_job(folder=f"w{checkpointing}")
        )  # type: ignore[arg-type]
        for checkpointing in (False, True)
    )
    assert plain.plan == saving.plan
    assert plain.records["learn_gates"]["curve"]["loss"] == pytest.approx(
        saving.records["learn_gates"]["curve"]["loss"], abs=1e-4
    )


def test_the_published_configurations_say_what_was_published() -> None:
    """The public pruning script and the paper's summary; values as printed there."""
    paper, script = (dict(build(read(f"compresso/{name}")).stages)["learn_gates"] for name in ("paper", "script"))
    assert isinstance(paper, LearnGates)
    assert isinstance(script, LearnGates)
    shared = {
        "rank": 8,
        "alpha": 8.0,
        "targets": ["q_proj", "v_proj"],
        "lr": 5e-5,
        "mask_lr": 0.1,
        "lambda_lr": 0.1,
        "dropout": 0.0,
    }
    for name, value in shared.items():
        assert dumped(paper)[name] == dumped(script)[name] == value
    assert (paper.tune, paper.ramp, paper.hold, paper.trains.batch) == ("1 epoch", "5 epochs", "1 epoch", 8)
    assert (script.tune, script.ramp, script.hold, script.trains.batch) == ("1 epoch", "4 epochs", "3 epochs", 1)
    for one in (paper, script):
        assert (one.constraint, one.start, one.noise, one.finish, one.ramp_shape) == (
            "lagrangian",
            "open",
            "batch",
            "soft",
            "linear",
        )
        assert (one.channel_droprate, one.open_mean, one.layer_gates) == (0.01, 10.0, "none")
        assert one.removes.kinds == (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN)
    recover = dict(build(read("compresso/script")).stages)["recover"]
    published = {"steps": "3 epochs", "lr": 4e-4, "lr_schedule": "cosine", "batch": 8}
    assert dumped(recover).items() >= published.items()


def test_gates_that_start_open_expect_what_the_published_start_expects(make_job: MakeJob) -> None:
    """Expected sparsity before the first update of a model with LLaMA's proportions is small but not zero."""
    job = make_job()
    stage = LearnGates(keep=0.7)
    axes = list(job.arch.axes(job.model))[: 2 * 3 + 1]
    cost = CostModel(axes, job.arch.weights(job.model))
    initial = stage._initial(job, axes, cost)
    for axis in axes:
        mean = 4.59512 if axis.kind == Kind.CHANNEL else 10.0
        assert float(initial[axis.name].mean()) == pytest.approx(mean, abs=0.02)
    clamped = {
        name: hard_concrete.keep_probability(hard_concrete.clamp_(value.clone())) for name, value in initial.items()
    }
    assert 0.003 < 1 - float(cost(clamped).blocks / cost().blocks) < 0.005


def test_nan_gates_never_leave_the_stage(make_job: MakeJob) -> None:
    from compresso.errors import NumericError

    job = make_job()
    with torch.no_grad():
        job.model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(NumericError):
        LearnGates(keep=0.7, **QUICK)(replace(job))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        (
            {"layer_gates": "layer", "constraint": "projection"},
            "layer_gates='layer' learn under constraint='lagrangian' only",
        ),
        ({"cost_aware": True}, "cost_aware=True goes with constraint='projection'"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused_with_the_cure(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        build({"name": "x", "stages": [{"learn_gates": knobs}]}, "x")


@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_a_lagrangian_that_ends_far_from_its_target_says_so(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture, layout: str
) -> None:
    """Gates that hardly move keep nearly all; a projection is on its target by construction."""
    knobs: dict[str, Any] = {**QUICK, "keep": 0.6, "layout": layout, "mask_lr": 1e-6}
    facts = LearnGates(**knobs)(make_job()).records["learn_gates"]
    assert facts["expected_keep"] > 0.9 > 1.02 * 0.6
    assert "constraint: projection" in facts["far_from_target"]
    assert any(facts["far_from_target"] in record.getMessage() for record in caplog.records)
    caplog.clear()
    projected = LearnGates(**{**knobs, "constraint": "projection"})(make_job(folder="projected"))
    assert "far_from_target" not in projected.records["learn_gates"] and not caplog.records


DEEP: dict[str, Any] = {"finish": "hard", "kinds": ("head", "channel", "layer"), **HARD}


def useless(job: Job, layer: int) -> Job:
    """The job with a layer that writes nothing."""
    with torch.no_grad():
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            job.model.get_parameter(f"model.layers.{layer}.{linear}.weight").zero_()
    return job


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        DEEP,
        {**DEEP, "finish": "soft", "cost_aware": True},
        {**DEEP, "kinds": ("head", "channel", "hidden", "layer", "attention", "mlp")},
        {"kinds": ("head", "channel", "layer"), "tune": 0},
    ],
)
def test_budgets_of_widths_and_depth_together_are_met(make_job: MakeJob, knobs: Mapping[str, Any]) -> None:
    """Scored or open, projected or under a Lagrangian, hard or soft; what is left is the model that was masked."""
    before = blocks(make_job())
    job = LearnGates(keep=0.6, **{**QUICK, **knobs})(make_job(folder="other"))  # type: ignore[arg-type]
    assert 0.6 * before - 3 * 32 < blocks(job) <= 0.6 * before
    assert job.records["learn_gates"]["masked_minus_smaller_max_abs"] < 1e-4
    assert len(job.arch.shapes(job.model)) == len(job.plan.kept["layers"]) == job.model.config.num_hidden_layers
    assert make_job(folder="third").cost().of(job.plan).parameters() == job.cost()().parameters()


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_writes_nothing_leaves_first(make_job: MakeJob, layer: int) -> None:
    """The budget is a layer's share: with it gone, no unit of the others has to leave."""
    job = LearnGates(keep=2 / 3, **{**QUICK, **DEEP, "hold": 2})(useless(make_job(), layer))  # type: ignore[arg-type]
    assert job.plan.kept["layers"] == tuple(i for i in range(3) if i != layer)
    assert widths(job) == [(8, 4, 48)] * 2


@pytest.mark.slow
def test_starting_with_layers_keeps_what_gate_taylor_keeps_when_nothing_is_learned(make_job: MakeJob) -> None:
    from compresso.methods.gate_taylor import GateTaylor

    knobs = {**QUICK, **DEEP, "lr": 0.0, "mask_lr": 0.0, "score_spread": 0.3}
    learned = LearnGates(keep=0.6, **knobs)(make_job())  # type: ignore[arg-type]
    scored = GateTaylor(keep=0.6, kinds=("head", "channel", "layer"), batches=1, batch=4)(make_job(folder="other"))  # type: ignore[arg-type]
    assert learned.plan == scored.plan


@pytest.mark.slow
@pytest.mark.parametrize("turned", [0, 1, 2])
def test_layers_in_the_order_of_influence_leave_as_shortgpt_drops_them(make_job: MakeJob, turned: int) -> None:
    """Another layer than the one without which the loss is least, where a layer's own loss says otherwise."""
    from compresso.methods.drop_layers import DropLayers

    def job(folder: str) -> Job:
        made = make_job(folder=folder)
        with torch.no_grad():
            made.model.get_parameter(f"model.layers.{turned}.mlp.down_proj.weight").mul_(0.3)
        return made

    knobs = {**QUICK, **HARD, "finish": "hard", "kinds": ("layer",), "lr": 0.0, "mask_lr": 0.0}
    learned = LearnGates(keep=0.34, depth_order="influence", **knobs)(job("a"))  # type: ignore[arg-type]
    dropped = DropLayers(keep=0.34, batches=1, batch=4)(job("b"))
    assert learned.plan.kept["layers"] == dropped.plan.kept["layers"]


@pytest.mark.slow
@pytest.mark.parametrize("journal", ["depth", "pools"])
def test_a_search_for_layers_that_was_stopped_goes_on_in_the_same_bits(make_job: MakeJob, journal: str) -> None:
    """The journals of losses survive: none that is known is taken again, and the result is the same."""
    knobs: dict[str, Any] = {**QUICK, **DEEP, "hold": 2}
    whole = LearnGates(keep=0.6, **knobs)(make_job(folder="whole"))
    LearnGates(keep=0.6, **knobs)(make_job(folder="stopped"))
    folder = make_job(folder="stopped").out / journal
    entries = sorted(folder.glob("round-*.json"))
    assert len(entries) == {"depth": 4, "pools": 3}[journal]  # the dense loss, and each layer, or both pools
    entries[-1].unlink()
    known = [entry.stat().st_mtime_ns for entry in entries[:-1]]
    again = LearnGates(keep=0.6, **knobs)(make_job(folder="stopped"))
    assert [entry.stat().st_mtime_ns for entry in entries[:-1]] == known
    assert entries[-1].is_file()
    assert again.plan == whole.plan
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_only_our_own_recipes_have_gates_on_layers() -> None:
    kinds = {name: dict(build(read(name)).stages)["learn_gates"] for name in ("compresso", "compresso/nano")}
    assert {name: stage.budget().kinds for name, stage in kinds.items() if isinstance(stage, LearnGates)} == {
        "compresso": (Kind.HEAD, Kind.CHANNEL, Kind.LAYER),
        "compresso/nano": (Kind.HEAD, Kind.CHANNEL),
    }


def test_a_shallow_model_keeps_its_layers_and_nothing_else_changes(make_job: MakeJob) -> None:
    """Of three layers: with `depth_from` 4 the result is that without the kind, bit for bit; with 3 layers may go."""
    knobs: dict[str, Any] = {**QUICK, **HARD, "finish": "hard", "hold": 2}
    widths_alone = LearnGates(keep=0.6, **{**knobs, "kinds": ("head", "channel")})(make_job(folder="one"))
    shallow = LearnGates(keep=0.6, **{**knobs, **DEEP, "hold": 2, "depth_from": 4})(make_job(folder="two"))
    assert shallow.plan == widths_alone.plan
    for (name, a), (_, b) in zip(shallow.model.named_parameters(), widths_alone.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    axes = make_job(folder="three").arch.axes(make_job(folder="three").model)
    deep = LearnGates(kinds=("head", "layer"), depth_from=3)
    assert deep.fitted(axes) is deep
    assert LearnGates(kinds=("layer",), depth_from=99).fitted(axes).removes.kinds == (
        Kind.LAYER,
    )  # or nothing could go
