"""Two-stage recovery: each stage sees its own kind, most of what was lost most, and a resumed run repeats the whole
one.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compresso.core.axis import Kind
from compresso.errors import CheckpointError, DataError
from compresso.job import Job
from compresso.methods.recover import Recover
from compresso.methods.recover_knowledge import RecoverKnowledge, sources_of, split
from compresso.metrics.held import held_loss
from tests.methods.conftest import MakeJob

CONTRACT = {"probed": 8}
"""For the contract of stages: its data is one small source."""

QUICK: dict[str, Any] = {
    "text_steps": 3,
    "instruction_steps": 3,
    "every": 2,
    "probed": 4,
    "batch": 4,
    "micro_batch": 4,
    "lr": 1e-2,
}
_LEARNED: dict[str, Tensor] = {}


@pytest.fixture(autouse=True)
def learned(make_job: MakeJob) -> None:
    """Every job's dense model has something to lose."""
    if not _LEARNED:
        _LEARNED.update(Recover(steps=80, batch=8, lr=1e-2)(make_job(folder="learned")).model.state_dict())


def damaged(job: Job) -> Job:
    """Half of the channels of a trained model gone; rows of two texts and one set of instructions."""
    job.model.load_state_dict(_LEARNED)
    dense = copy.deepcopy(job.model)
    job = replace(job, original=lambda dtype, device: copy.deepcopy(dense))
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind == Kind.CHANNEL]
    job = job.without({axis.name: (torch.arange(axis.size) % 2).float() for axis in axes}, "damage")
    rows: list[Any] = []
    for i, row in enumerate(job.rows):
        labels = row["labels"] if i % 3 else [-100] * 4 + list(row["labels"][4:])
        rows.append({**row, "labels": labels, "source": ("answers", "books", "web")[i % 3]})
    return replace(job, rows=rows, records={})


def test_sources_are_told_apart_by_name_and_kind(make_job: MakeJob) -> None:
    assert [*sources_of(damaged(make_job()).rows)] == [("answers", False), ("books", True), ("web", True)]
    assert [*sources_of(make_job().rows)] == [("data", True)]


def test_measured_rows_are_not_trained_on(make_job: MakeJob) -> None:
    rows = sources_of(damaged(make_job()).rows)
    probes, training = split(rows, 5)
    for key, whole in rows.items():
        assert len(probes[key]) == 5
        assert sorted(map(id, probes[key] + training[key])) == sorted(map(id, whole))
    assert [len(one) for one in split(rows, 1000)[0].values()] == [6, 6, 6]


def test_each_stage_draws_from_its_kind_in_proportion_to_what_was_lost(make_job: MakeJob) -> None:
    job = RecoverKnowledge(**QUICK)(damaged(make_job()))
    record = job.records["recover_knowledge"]
    assert record["updates"] == {"texts": 3, "instructions": 3}
    assert [one["kind"] for one in record["sources"]] == ["instruction", "text", "text"]
    curve = record["curve"]
    assert curve["share_0"] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    first = [max(one["lost_before"], 0.0) for one in record["sources"]]
    assert curve["share_1"][0] == pytest.approx(first[1] / (first[1] + first[2]), abs=1e-5)
    assert curve["lost_1"][0] == curve["lost_1"][1] != curve["lost_1"][2]  # measured anew after two updates


def test_what_was_lost_is_the_rise_over_the_dense_model_on_the_probes(make_job: MakeJob) -> None:
    job = damaged(make_job())
    assert job.original is not None
    dense = job.original(torch.float32, torch.device("cpu"))
    probes, _ = split(sources_of(job.rows), 4)
    wanted = [held_loss(job.model, rows).mean - held_loss(dense, rows).mean for rows in probes.values()]
    record = RecoverKnowledge(**QUICK)(job).records["recover_knowledge"]
    assert [one["lost_before"] for one in record["sources"]] == pytest.approx(wanted)


def test_it_recovers(make_job: MakeJob) -> None:
    job = damaged(make_job())
    before = held_loss(job.model, job.held).mean
    after = RecoverKnowledge(**{**QUICK, "text_steps": 40, "instruction_steps": 20})(job)
    assert held_loss(after.model, after.held).mean < before - 0.1


def test_one_kind_alone_takes_all_updates_and_the_records_say_so(make_job: MakeJob) -> None:
    record = RecoverKnowledge(**QUICK)(make_job()).records["recover_knowledge"]
    assert record["updates"] == {"texts": 6, "instructions": 0}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4])
def test_it_goes_on_where_it_was_interrupted(make_job: MakeJob, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = {**QUICK, "save_every": 1, "dropout": 0.1}
    whole = RecoverKnowledge(**knobs)(damaged(make_job(folder="whole")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls = iter(range(step))

        def stops(*arguments: Any) -> dict[str, float]:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(*arguments)

        from compresso.methods import recover_knowledge

        original = recover_knowledge.logged
        patch.setattr(recover_knowledge, "logged", stops)
        RecoverKnowledge(**knobs)(damaged(make_job(folder="cut")))
    resumed = RecoverKnowledge(**knobs)(damaged(make_job(folder="cut")))
    assert resumed.records["recover_knowledge"] == whole.records["recover_knowledge"]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_what_it_cannot_do_without_is_named(make_job: MakeJob) -> None:
    with pytest.raises(CheckpointError, match="compares with the dense model"):
        RecoverKnowledge(**QUICK)(replace(make_job(), original=None))
    job = make_job()
    with pytest.raises(DataError, match="source 'data' has 1 row of its kind"):
        RecoverKnowledge(**QUICK)(replace(job, rows=job.rows[:1]))
