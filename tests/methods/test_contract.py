"""What every registered stage must keep to, whatever it does. Stages are found; none is named here."""

import importlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compresso.job import Job
from compresso.runner.recipe import build
from compresso.stage import (
    Calibrates,
    Card,
    ChecksModel,
    Effects,
    Learns,
    Shrinks,
    Stage,
    Sweeps,
    Trains,
    TunesLora,
    cards,
    check_order,
)
from compresso.training.duration import Duration
from compresso.training.order import ShuffledBatches
from tests.methods.conftest import MakeJob

QUICK: dict[type, dict[str, Any]] = {
    Trains: {"steps": 2, "batch": 4, "micro_batch": 4},
    Calibrates: {"batches": 1, "batch": 4, "micro_batch": 4},
    TunesLora: {"rank": 2},
}
"""Knobs of the groups that make any stage quick; durations of a stage's own are two updates.

A stage whose defaults do not suit the tiny model names what does as `CONTRACT` in its test file, and what has to have
happened to the model as `prepared`.
"""

every_stage = pytest.mark.parametrize(
    "card",
    [pytest.param(card, marks=pytest.mark.slow if name == "bonsai" else ()) for name, card in cards().items()],
    ids=lambda card: card.name,
)


def quick(card: Card) -> dict[str, Any]:
    """Knobs of a stage for a run of a second, found by its groups and its test file."""
    of_groups = {
        name: QUICK[knob.group][name]
        for name, knob in card.knobs.items()
        if knob.group in QUICK and name in QUICK[knob.group]
    }
    own = {field.name: 2 for field in fields(card.type) if field.type == Duration}
    return {**of_groups, **own, **_of_test_file(card, "CONTRACT", {})}


def _of_test_file(card: Card, name: str, default: Any) -> Any:
    """What a stage's test file says for the contract."""
    file = f"test_{card.type.__module__.rpartition('.')[2]}"
    there = (Path(__file__).parent / f"{file}.py").is_file()
    return getattr(importlib.import_module(f"tests.methods.{file}"), name, default) if there else default


@pytest.fixture
def make_job(make_job: MakeJob, request: pytest.FixtureRequest) -> MakeJob:
    """Fresh jobs, of a model to which has happened what a stage's test file says as `prepared`."""
    card: Card | None = getattr(request.node, "callspec").params.get("card")  # noqa: B009  pytest's own
    prepare = (lambda job: job) if card is None else _of_test_file(card, "prepared", lambda job: job)
    return lambda **how: prepare(make_job(**how))


def done(card: Card, job: Job) -> Job:
    return card.type(**quick(card))(job)


def tensors(job: Job) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in job.model.state_dict().items()}


@every_stage
def test_declared_effects_are_the_effects(card: Card, make_job: MakeJob) -> None:
    job = make_job()
    before = tensors(job)
    after = tensors(done(card, job))
    shapes_changed = {name: tensor.shape for name, tensor in before.items()} != {
        name: tensor.shape for name, tensor in after.items()
    }
    assert shapes_changed == (Effects.SHAPES in card.effects)
    if not shapes_changed:
        same = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert same == (Effects.WEIGHTS not in card.effects)
    elif Effects.WEIGHTS not in card.effects:  # what stays is what was there
        entries = {name: set(tensor.flatten().tolist()) for name, tensor in before.items()}
        assert all(set(tensor.flatten().tolist()) <= entries[name] for name, tensor in after.items())


@every_stage
def test_the_plan_is_what_was_removed(card: Card, make_job: MakeJob) -> None:
    before = make_job()
    after = done(card, make_job())
    assert before.cost().of(after.plan).parameters() == after.cost()().parameters()
    assert after.plan.is_noop(before.arch.axes(before.model)) == (Effects.SHAPES not in card.effects)


@pytest.mark.slow
@every_stage
def test_the_seed_decides_everything(card: Card, make_job: MakeJob) -> None:
    torch.manual_seed(1)
    one = tensors(done(card, make_job()))
    torch.manual_seed(2)  # the global generator does not
    other = tensors(done(card, make_job(folder="other")))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@every_stage
def test_records_are_json_under_the_stage_s_name(card: Card, make_job: MakeJob) -> None:
    records = done(card, make_job()).records
    assert list(records) == [card.name]
    assert json.loads(json.dumps(records, allow_nan=False)) == records


@every_stage
def test_the_model_stays_finite_and_without_adapters(card: Card, make_job: MakeJob) -> None:
    model = done(card, make_job()).model
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    assert not [name for name, _ in model.named_modules() if "lora" in name]


@every_stage
def test_knobs_are_checked(card: Card) -> None:
    with pytest.raises(ValidationError):
        card.type(nonsense=1)
    with pytest.raises(ValidationError):
        card.type(keep=float("nan"))
    groups = {knob.group for knob in card.knobs.values() if knob.group}
    documented = " ".join(kind.__doc__ or "" for kind in (card.type, *groups))
    words = documented.replace(",", " ").replace(":", " ").split()
    named = {*card.knobs, *(field.name for field in fields(card.type))}
    assert named <= set(words), named - set(words)


@every_stage
def test_a_card_tells_a_person_what_to_expect(card: Card) -> None:
    assert card.title
    assert card.when
    assert card.failures
    assert set(card.needs) <= {"data", "gradients", "training"}


@every_stage
def test_a_stage_offers_what_its_card_says(card: Card) -> None:
    made = card.type()
    assert isinstance(made, Stage)
    assert isinstance(made, Learns) == ("training" in card.needs)
    assert isinstance(made, Shrinks) == (Effects.SHAPES in card.effects)
    assert isinstance(made, Sweeps) == ("calibration" in card.knobs)
    assert isinstance(made, ChecksModel) or "where" not in card.knobs  # what it names has to be there


@every_stage
def test_the_passes_that_a_stage_names_are_those_that_it_takes(card: Card, make_job: MakeJob) -> None:
    """Examples that pass a block, the mean over the blocks. Named is the most: data of one kind or size may want fewer.
    The comparison of the masked with the smaller model takes one each.
    """
    job = make_job()
    few = {"calibration": {"examples": 8}} if "calibration" in card.knobs else {}
    stage = card.type(**quick(card), **few)
    named = sum((one.examples or 0) * one.forwards for one in stage.work(job.model, job.arch) if not one.dense)
    blocks, passed = list(job.arch.blocks(job.model)), 0

    def count(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal passed
        if "forward" not in vars(block):  # a sweep puts a stand-in there while it records what blocks are called with
            passed += len(given[0] if given else named["hidden_states"])

    for block in blocks:
        block.register_forward_pre_hook(count, with_kwargs=True)
    stage(job)
    assert 0.75 * named <= passed / len(blocks) <= named + 2 + 1e-6


@every_stage
def test_a_stage_leaves_the_job_it_was_given(card: Card, make_job: MakeJob) -> None:
    job = make_job()
    before = replace(job)
    done(card, job)
    assert job.records == before.records == {}
    assert job.plan == before.plan


def test_orders_that_cannot_work_are_refused() -> None:
    from compresso.errors import RecipeError

    check_order([("a", Effects.SHAPES | Effects.WEIGHTS), ("b", Effects.WEIGHTS), ("c", Effects.NONE)])
    with pytest.raises(RecipeError, match="'b' changes shapes after 'a'"):
        check_order([("a", Effects.FORWARD), ("b", Effects.SHAPES)])


def test_stages_in_any_order_the_effects_allow() -> None:
    build({"stages": ["recover", "gate_taylor"]})


@pytest.mark.parametrize(
    "card",
    [
        pytest.param(card, marks=pytest.mark.slow if name == "bonsai" else ())
        for name, card in cards().items()
        if any(knob.group is Calibrates for knob in card.knobs.values()) and not issubclass(card.type, Learns)
    ],
    ids=lambda card: card.name,
)
def test_few_examples_are_looked_at_once_each(card: Card, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although more are asked for; what is read never comes round to the next epoch."""
    read, at = list[int](), ShuffledBatches.at

    def seen(source: ShuffledBatches, update: int, rows: range) -> dict[str, torch.Tensor]:
        read.append(update * source.global_batch + rows.stop)
        assert read[-1] <= source.examples
        return at(source, update, rows)

    monkeypatch.setattr(ShuffledBatches, "at", seen)
    job = make_job()
    few = replace(job, rows=job.rows[:3])
    facts = done(card, few).records[card.name]
    assert max(read, default=3) == 3  # some look at examples by another way
    assert facts.get("calibration_examples", 3) == 3
