"""Bonsai: it finds the unit that harms most, ends on its budget, goes on where it was killed, and has no gradient."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import compresso.methods.bonsai as bonsai
from compresso.arch.queries import axes_of
from compresso.core.axis import Kind
from compresso.core.l1_regression import GRID
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.methods.bonsai import Bonsai
from compresso.training.progress import Progress
from tests.conftest import SHORT, Call, Forked
from tests.methods.conftest import MakeJob

QUICK: dict[str, Any] = {"masks": 20, "batches": 1, "batch": 8, "micro_batch": 8}
ANY_HEAD: dict[str, Any] = {"kinds": (Kind.HEAD,), "floor": {Kind.HEAD: 0}, "prior": "random"}


def scored(monkeypatch: pytest.MonkeyPatch, loss: Any) -> None:
    """Give sub-models losses that a function has for their masks."""

    def losses(
        model: PreTrainedModel, axes: Any, masks: Sequence[Mapping[str, Tensor]], batches: Any, **_: Any
    ) -> Tensor:
        return torch.tensor([loss(mask) for mask in masks], dtype=torch.float64)

    monkeypatch.setattr(bonsai, "losses_under", losses)


def rounds_of(job: Job) -> list[dict[str, Any]]:
    return job.records["bonsai"]["rounds"]


def after_first_round(folder: Path) -> dict[str, list[int]]:
    return json.loads((folder / "rounds" / "round-000000.json").read_text())["value"]["kept"]


def bytes_of(job: Job) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in job.model.state_dict().items()}


@pytest.mark.parametrize(("layer", "group"), [(0, 3), (1, 1), (2, 0)])
def test_the_head_that_harms_most_leaves_first(make_job: MakeJob, layer: int, group: int) -> None:
    """One that writes, much and everywhere, what a token is read from that never comes."""
    job = make_job()
    with torch.no_grad():
        never = job.model.get_parameter("model.embed_tokens.weight")[0]
        written = job.model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")
        written[:, 16 * group : 16 * group + 16] = 30 * never.unsqueeze(1)
    job = Bonsai(keep=0.9, **ANY_HEAD, **QUICK | {"masks": 40})(job)
    kept = after_first_round(job.out)
    assert kept.pop(f"layers.{layer}.heads") == [i for i in range(4) if i != group]
    assert all(units == [0, 1, 2, 3] for units in kept.values())
    assert rounds_of(job)[0]["better_than_prior"]


def test_channels_leave_in_the_order_of_what_the_loss_minds(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """It minds none whose number divides by 3, and each of the others as much as its number says."""
    minded = 0.01 * torch.arange(48.0) * (torch.arange(48) % 3 > 0)
    varied = {f"layers.{i}.channels": torch.zeros(48, dtype=torch.bool) for i in range(3)}
    masks = 0

    def loss(mask: Mapping[str, Tensor]) -> float:
        nonlocal masks
        masks += 1
        for name, one in mask.items() if masks <= 60 else ():
            varied[name] |= one == 0
        return sum(float(((1 - one) * minded[: len(one)]).sum()) for one in mask.values())

    scored(monkeypatch, loss)
    knobs: dict[str, Any] = {"kinds": (Kind.CHANNEL,), "prior": "random", "round_share": 0.02}
    job = Bonsai(keep=0.96, **knobs, **QUICK | {"masks": 60})(make_job())
    kept = {name: torch.isin(torch.arange(48), torch.tensor(u)) for name, u in after_first_round(job.out).items()}
    gone = torch.cat([minded[~kept[name]] for name in varied])
    left = torch.cat([minded[kept[name] & varied[name]] for name in varied])
    assert all(bool((varied[name] | kept[name]).all()) for name in varied)
    assert len(gone) == 6
    assert float(gone.max()) <= float(left.min())


@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes",
    [
        {"keep": 0.72},
        {"keep": 0.8, "of": "total"},
        {"keep": 0.7, "layout": "uniform"},
        {
            "keep": 0.7,
            "kinds": (Kind.HEAD, Kind.CHANNEL),
            "multiple_of": {Kind.CHANNEL: 8},
            "floor": {Kind.HEAD: 2},
        },
        {"keep": 0.8, "kinds": (Kind.CHANNEL,), "sampler": "published", "metric": "ppl", "prior": "magnitude"},
    ],
)
def test_it_ends_on_its_budget_and_computes_what_the_masks_left(make_job: MakeJob, shapes: dict[str, Any]) -> None:
    job = Bonsai(**QUICK, **shapes)(make_job())
    record = job.records["bonsai"]
    dense = make_job().cost()
    kept = float(job.cost()().count(shapes.get("of", "blocks")) / dense().count(shapes.get("of", "blocks")))
    assert shapes["keep"] - 0.05 < kept <= shapes["keep"] * (1.005 if "multiple_of" in shapes else 1)
    assert dense.of(job.plan).parameters() == job.cost()().parameters() == record["parameters_after"]
    assert record["parameters_before"] == dense().parameters()
    assert record["masked_minus_smaller_max_abs"] < 1e-5
    widths = {axis.size for axis in job.arch.axes(job.model) if axis.kind == Kind.CHANNEL}
    assert len(widths) == 1 or shapes.get("layout") != "uniform"
    assert "multiple_of" not in shapes or all(width % 8 == 0 for width in widths)


def test_the_query_heads_leave_first_whose_key_value_heads_mind_them_least_together(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query head counts where its key/value head is there alone; one of each leaves at once."""
    minded = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 5 + 0.1
    minded[1, 2] = 0  # one that none minds does not make up for the others of its layer
    varied, masks = torch.zeros(3, 4, 2, dtype=torch.bool), 0

    def loss(mask: Mapping[str, Tensor]) -> float:
        nonlocal masks
        masks, total = masks + 1, 0.0
        for i in range(3) if masks <= 200 else ():
            for g, head in enumerate(mask[f"layers.{i}.heads"].tolist()):
                off = mask[f"layers.{i}.heads.{g}.queries"] == 0
                varied[i, g] |= off
                total += float(minded[i, g][off].sum()) if head else 1.5
        return total

    scored(monkeypatch, loss)
    knobs: dict[str, Any] = {"kinds": (Kind.HEAD, Kind.QUERY), "prior": "random", "round_share": 0.07}
    job = Bonsai(keep=0.86, **knobs, **QUICK | {"masks": 200})(make_job())
    first = after_first_round(job.out)
    assert bool((varied.sum(dim=2) == 1).all())
    least = int((minded * varied).sum(dim=(1, 2)).argmin())
    for i in range(3):
        assert first[f"layers.{i}.heads"] == [0, 1, 2, 3]
        for g in range(4):
            kept = [r for r in range(2) if i != least or not varied[i, g, r]]
            assert first[f"layers.{i}.heads.{g}.queries"] == kept


@pytest.mark.parametrize("kinds", [(Kind.HEAD, Kind.QUERY), (Kind.HEAD, Kind.QUERY, Kind.CHANNEL)])
def test_layers_keep_equal_counts_and_the_plan_leads_there_at_once(make_job: MakeJob, kinds: tuple[Kind, ...]) -> None:
    job = Bonsai(keep=0.75, kinds=kinds, floor={Kind.HEAD: 1}, prior="random", **QUICK)(make_job())
    shapes, again = job.arch.shapes(job.model), make_job()
    assert any(shape.query_heads < 2 * shape.kv_heads for shape in shapes)
    assert any(shape.kv_heads < 4 for shape in shapes)
    plan = Plan.from_json(job.plan.to_json())
    shrink_(again.model, axes_of(again.arch, again.model, kinds), plan)
    assert again.arch.shapes(again.model) == shapes
    assert bytes_of(again) == bytes_of(job)
    kept = job.records["bonsai"]["units_kept"]
    assert all(f"layers.{i}.heads.{g}.queries" in kept for i in range(3) for g in plan.kept[f"layers.{i}.heads"])


def test_query_heads_leave_with_their_key_value_head_where_they_are_no_kind(make_job: MakeJob) -> None:
    job = Bonsai(keep=0.7, kinds=(Kind.HEAD, Kind.CHANNEL), **QUICK)(make_job())
    assert not [name for name in job.plan.kept if name.endswith("queries")]
    assert all(shape.query_heads == 2 * shape.kv_heads for shape in job.arch.shapes(job.model))


def test_every_round_draws_masks_and_examples_of_its_own(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    losses = bonsai.losses_under

    def looked(model: Any, axes: Any, masks: Any, batches: Any, **how: Any) -> Tensor:
        seen.append(torch.cat([batch["input_ids"] for batch in batches]))
        return losses(model, axes, masks, batches, **how)

    monkeypatch.setattr(bonsai, "losses_under", looked)
    job = Bonsai(keep=0.8, **QUICK)(make_job())
    assert len(seen) == len({record["seed"] for record in rounds_of(job)}) == 4
    assert not any(torch.equal(one, other) for i, one in enumerate(seen) for other in seen[:i])


def test_nothing_has_a_gradient(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job, forwards = make_job(), 0
    job.model.requires_grad_(True)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient was asked for")

    def looked(module: Any, given: Any, output: Any) -> None:
        nonlocal forwards
        forwards += 1
        assert not torch.is_grad_enabled()
        first = output[0] if isinstance(output, tuple) else output
        assert not isinstance(first, Tensor) or not first.requires_grad

    for module in job.model.modules():
        module.register_forward_hook(looked)
    monkeypatch.setattr(Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    job = Bonsai(keep=0.8, **QUICK)(job)
    assert forwards > 4 * 20
    assert all(parameter.grad is None for parameter in job.model.parameters())
    searched, compared = Bonsai(keep=0.8, **QUICK).work(job.model, job.arch)
    assert (searched.examples, searched.forwards, searched.backwards) == (4 * 8, 1 + 20, 0)
    assert compared.backwards == 0


@pytest.mark.slow
@pytest.mark.parametrize("at", [(1, 7), (3, 20)])
def test_a_search_that_stopped_goes_on_with_its_losses(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, at: tuple[int, int]
) -> None:
    knobs: dict[str, Any] = {**QUICK, "kinds": (Kind.HEAD, Kind.QUERY), "prior": "random"}
    whole = Bonsai(keep=0.8, **knobs)(make_job(folder="whole"))
    assert any(len(units) == 1 for name, units in whole.plan.kept.items() if name.endswith("queries"))
    step, taken = Progress.step, list[str]()

    def stops(self: Progress, done: int, now: str, facts: Any, tokens: float) -> None:
        taken.append(now)
        if (now, done) == (f"round {at[0]}", at[1]):
            raise KeyboardInterrupt
        step(self, done, now, facts, tokens)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "step", stops)
        Bonsai(keep=0.8, **knobs)(make_job(folder="stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", lambda self, done, now, facts, tokens: taken.append(now))
        resumed = Bonsai(keep=0.8, **knobs)(make_job(folder="stopped"))
    assert len([name for name in taken if name != "observe"]) == 4 * 20
    assert bytes_of(resumed) == bytes_of(whole)
    assert resumed.plan == whole.plan
    assert resumed.records == whole.records


@pytest.mark.slow
def test_a_run_that_was_killed_in_a_round_ends_in_the_same_bytes(
    tiny_folder: Path, instructions: Path, forked: Forked, tmp_path: Path
) -> None:
    knobs = ("keep=0.9", "masks=12", "batches=1", "batch=4", "micro_batch=4")
    sets = [*SHORT, *(f"stages.bonsai.{knob}" for knob in knobs), "stages.distill.batch=4"]

    def run(output: Path, *more: str, **event: Any) -> int:
        arguments = ["run", "bonsai", "--model", str(tiny_folder), "--data", str(instructions), "--max-steps", "2"]
        arguments += ["--output", str(output), *(part for one in sets for part in ("--set", one))]
        code, log = forked([*arguments, *more], **event)
        assert code in (0, -9), log
        return code

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "killed", event="kill", phase="round 2", at=5) == -9
    assert run(tmp_path / "killed", "--resume") == 0
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, other = (
        json.loads((tmp_path / name / "records.json").read_text())["stages"]["bonsai"] for name in ("whole", "killed")
    )
    assert one["rounds"] == other["rounds"]


def test_the_published_sampler_is_refused_for_grouped_queries_before_weights_are_read(
    make_job: MakeJob, tiny_folder: Path, call: Call
) -> None:
    job = make_job()
    message = r"layers\.0\.heads's 4 units .*take the sampler 'independent'"
    with pytest.raises(RecipeError, match=message):
        Bonsai(sampler="published").check(job.model, job.arch)
    Bonsai(sampler="published", kinds=(Kind.CHANNEL,)).check(job.model, job.arch)
    Bonsai().check(job.model, job.arch)
    code, _, error = call("plan", "bonsai", "--model", tiny_folder, "--set", "stages.bonsai.sampler=published")
    assert code == 2
    assert error.count("\n") == 1
    assert "take the sampler 'independent'" in error


def test_a_round_that_learned_nothing_says_so_and_losses_that_overflow_are_clipped(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    noise = torch.Generator().manual_seed(0)
    scored(monkeypatch, lambda mask: float(torch.rand(1, generator=noise)))
    with caplog.at_level(logging.WARNING, logger=bonsai.__name__):
        job = Bonsai(keep=0.8, **QUICK)(make_job())
    blind = [record for record in rounds_of(job) if not record["better_than_prior"]]
    assert blind and all(record["tau"] < 0.1 for record in blind)
    assert len([line for line in caplog.messages if "no better than its prior" in line]) == len(blind)
    values = iter([float("inf"), float("nan"), 1e30] * 100)
    scored(monkeypatch, lambda mask: next(values))
    job = Bonsai(keep=0.95, metric="ppl", **QUICK)(make_job(folder="overflow"))
    assert rounds_of(job)[0]["loss"] == pytest.approx(18.42, abs=0.01)  # log 1e8


def test_the_published_regression_takes_the_published_samplers_masks(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"grid": GRID[-1:], "epochs": 5, "together": 1}
    monkeypatch.setattr("compresso.core.l1_regression.l1_regression.__kwdefaults__", kept)
    knobs: dict[str, Any] = {"kinds": (Kind.CHANNEL,), "sampler": "published", "regression": "published"}
    job = Bonsai(keep=0.9, **knobs, **QUICK)(make_job())
    assert [(record["columns"], record["batch"]) for record in rounds_of(job)] == [(15, 128.0)] * 2


def test_other_units_than_heads_query_heads_and_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="only heads, query heads and channels are varied"):
        Bonsai(kinds=(Kind.LAYER,))
    with pytest.raises(ValueError, match="multiple of 2"):
        Bonsai(masks=11)
