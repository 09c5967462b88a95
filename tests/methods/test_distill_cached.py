"""A cached teacher teaches what a live one does, is never in memory with its student, and is not asked twice."""

import shutil
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import compresso.stage.tuning
from compresso.core.axis import Kind
from compresso.errors import CheckpointError, NumericError, RecipeError, ResourceError, ResumeError
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.tasks.base import task_named
from compresso.training import teacher_store
from compresso.training.fit import fit
from compresso.training.teacher_store import TeacherStore
from tests.methods.conftest import MakeJob
from tests.methods.test_distill import SHORT, from_dense, without

CACHED: dict[str, Any] = {**SHORT, "teacher": "cached", "teacher_top": 8}


def damaged(make_job: MakeJob, **how: Any) -> Job:
    return without(make_job(**how), Kind.CHANNEL, range(20))


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in job.model.state_dict().items()}


def files(job: Job) -> dict[str, bytes]:
    return {
        path.relative_to(job.out).as_posix(): path.read_bytes() for path in sorted(job.out.rglob("teacher.safetensors"))
    }


def reads(job: Job, original: Callable[..., PreTrainedModel]) -> Job:
    return replace(job, original=original)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"divergence": "js", "temperature": 2.0, "tokens": "all", "hard_weight": 0.5, "chunk": 7},
        {"train": "all", "divergence": "reverse", "lr": 3e-3, "micro_batch": 4},
    ],
    ids=lambda knobs: ",".join(knobs) or "default",
)
def test_with_the_whole_vocabulary_it_is_the_live_teacher(make_job: MakeJob, knobs: dict[str, Any]) -> None:
    how = {**SHORT, "steps": 6, **knobs}
    live = Distill(**how)(damaged(make_job, folder="live"))
    kept = Distill(**how, teacher="cached", teacher_top=1000)(damaged(make_job, folder="kept"))
    for name, ours in weights(kept).items():
        torch.testing.assert_close(ours, weights(live)[name], atol=1e-4, rtol=1e-3, msg=name)
    one, other = (job.records["distill"]["curve"] for job in (kept, live))
    assert one.keys() == other.keys()
    assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-3)
    gap = kept.records["distill"]["teacher_gap"]
    assert gap["rest"] == 0 and abs(gap["before"]["gap"]) + abs(gap["after"]["gap"]) < 1e-9
    assert kept.records["distill"]["teacher"]["top"] == 64


def test_a_few_outcomes_bring_a_damaged_model_nearer_to_the_dense_one(make_job: MakeJob) -> None:
    job = damaged(make_job)
    before = from_dense(job)
    job = Distill(steps=30, **CACHED)(job)
    assert from_dense(job) < 0.7 * before
    records = job.records["distill"]
    gap = records["teacher_gap"]
    assert gap["places"] == 4 * 8  # of four held-out examples eight places each
    assert 0 < gap["rest"] < 1
    for when in ("before", "after"):
        assert 0 < gap[when]["gap"] == gap[when]["full"] - gap[when]["cached"]
        assert gap[when]["cached"] > 0
    assert gap["after"]["full"] < gap["before"]["full"]
    # a row of 12 tokens predicts 11 labels; 30 updates of 8 see all 36 rows
    assert records["teacher"] == {"top": 8, "examples": 36, "places": 396, "bytes": 396 * (8 * 8 + 4)}
    assert sum(len(data) for name, data in files(job).items() if "/training/" in name) == pytest.approx(
        records["teacher"]["bytes"], abs=200
    )


def test_the_gap_is_that_of_the_whole_divergence_where_it_is_measured(make_job: MakeJob) -> None:
    """Held-out examples cut to nine tokens predict at eight places: all of them are measured."""
    job = damaged(make_job)
    job = replace(job, held=[{name: row[name][:9] for name in ("input_ids", "labels")} for row in job.held])
    assert job.original is not None
    dense, ids = job.original(torch.float32, torch.device("cpu")), torch.tensor([row["input_ids"] for row in job.held])
    with torch.no_grad():
        log_p, log_q = (model(ids).logits[:, :-1].log_softmax(-1) for model in (dense, job.model))
    wanted = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    rest = 1 - float(log_p.exp().topk(8).values.sum(-1).mean())
    gap = Distill(steps=1, **CACHED)(job).records["distill"]["teacher_gap"]
    assert gap["before"]["full"] == pytest.approx(wanted, rel=1e-4)
    assert gap["rest"] == pytest.approx(rest, rel=1e-4)


def test_teacher_and_student_are_never_in_memory_together(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job, teachers = damaged(make_job), list[weakref.ref[PreTrainedModel]]()
    given = weights(job)
    dense = job.original
    assert dense is not None

    def original(dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        assert not sum(tensor.numel() for tensor in [*job.model.parameters(), *job.model.buffers()])
        teacher = dense(dtype, device)
        teachers.append(weakref.ref(teacher))
        return teacher

    def trains(*given_: Any, **named: Any) -> Any:
        assert len(teachers) == 1 and teachers[0]() is None
        assert all(torch.equal(tensor, given[name]) for name, tensor in weights(job).items() if name in given)
        return fit(*given_, **named)

    monkeypatch.setattr(compresso.stage.tuning, "fit", trains)
    Distill(steps=2, **CACHED)(reads(job, original))
    assert len(teachers) == 1


def test_the_teacher_s_logits_exist_for_a_piece_of_the_tokens_at_a_time(make_job: MakeJob) -> None:
    job, seen = damaged(make_job), list[int]()
    dense = job.original
    assert dense is not None

    def original(dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        teacher = dense(dtype, device)
        head = teacher.get_output_embeddings()
        assert head is not None
        head.register_forward_hook(lambda head, given, logits: seen.append(logits.shape[:-1].numel()))
        return teacher

    Distill(steps=2, **CACHED, chunk=13)(reads(job, original))
    assert max(seen) == 13 and sum(seen[2:]) == 16 * 11 + 4 * 8  # two of the check of its halves


def test_only_rows_that_will_be_seen_are_asked_for(make_job: MakeJob) -> None:
    records = Distill(steps=2, **CACHED)(damaged(make_job)).records["distill"]
    assert records["teacher"]["examples"] == 16


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_store, "CHUNK", 5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
def test_a_killed_teacher_goes_on_and_a_finished_one_is_not_read_again(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {**CACHED, "steps": 6, "save_every": 2, "dropout": 0.1}
    whole = Distill(**knobs)(damaged(make_job, folder="whole"))
    assert len(files(whole)) == 9  # 36 rows, and those held out

    written, write = list[int](), TeacherStore.write

    def stops(self: TeacherStore, number: int, taught: Any) -> None:
        if len(written) == 4:
            raise Killed
        written.append(number)
        write(self, number, taught)

    monkeypatch.setattr(TeacherStore, "write", stops)
    with pytest.raises(Killed):
        Distill(**knobs)(damaged(make_job, folder="cut"))
    assert len(files(damaged(make_job, folder="cut"))) == 4

    def counts(self: TeacherStore, number: int, taught: Any) -> None:
        written.append(number)
        write(self, number, taught)

    monkeypatch.setattr(TeacherStore, "write", counts)
    cut = Distill(**knobs)(damaged(make_job, folder="cut"))
    assert len(written) == 9  # each chunk once
    assert files(cut) == files(whole)
    assert cut.records["distill"] == whole.records["distill"]

    def fails(*_: Any) -> PreTrainedModel:
        raise NumericError("the teacher is read again")

    later = damaged(make_job, folder="later")
    shutil.copytree(whole.out / "teacher", later.out / "teacher")
    shutil.copytree(whole.out / "step-000004", later.out / "step-000004")
    resumed = Distill(**knobs)(reads(later, fails))
    assert resumed.records["distill"] == whole.records["distill"]
    for job in (cut, resumed):
        assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(job).items())


@pytest.mark.parametrize("other", ["knobs", "rows", "model"])
def test_another_training_is_refused_what_was_kept(make_job: MakeJob, other: str) -> None:
    Distill(steps=2, **CACHED)(damaged(make_job))
    job = damaged(make_job)
    for path in job.out.glob("step-*"):
        shutil.rmtree(path)
    knobs = {**CACHED, "teacher_top": 9} if other == "knobs" else CACHED
    if other == "rows":
        job = replace(job, rows=[{**row, "labels": [-100, *row["labels"][1:]]} for row in job.rows][::-1])
    if other == "model":
        job = replace(job, identity={"model": "another"})
    with pytest.raises(ResumeError, match="belongs to another run"):
        Distill(steps=2, **knobs)(job)


def test_rows_without_a_label_take_no_place(make_job: MakeJob) -> None:
    job = damaged(make_job)
    rows = [{**row, "labels": [-100] * 12} if i % 3 == 0 else row for i, row in enumerate(job.rows)]
    records = Distill(steps=6, **CACHED)(replace(job, rows=rows, held=[])).records["distill"]
    assert records["teacher"]["places"] == 24 * 11
    assert records["teacher_gap"] == {"places": 0, "before": None, "after": None}


def test_what_is_not_kept_is_refused(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match=r"compares hidden states.*teacher: live"):
        Distill(teacher="cached", intermediate_weight=0.5)
    job = damaged(make_job)
    with pytest.raises(RecipeError, match=r"task is classification; give teacher: live"):
        Distill(**CACHED)(replace(job, task=task_named("classification")))
    config = LlamaConfig(**{**job.model.config.to_dict(), "vocab_size": 72})
    with pytest.raises(RecipeError, match="vocabulary of 64, its teacher one of 72"):
        Distill(**CACHED)(reads(job, lambda dtype, device: LlamaForCausalLM(config)))
    assert job.model.get_input_embeddings().weight.numel() == 64 * 32  # the student is back
    with pytest.raises(CheckpointError, match=r"set Job\.original"):
        Distill(**CACHED)(replace(job, original=None))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10))
    with pytest.raises(ResourceError, match="smaller teacher_top"):
        Distill(**CACHED)(job)
    assert not list(Path(job.out).rglob("batch-*"))


def test_logits_that_overflow_are_named(make_job: MakeJob) -> None:
    """A token that the check of the model's two halves does not try."""
    job = damaged(make_job, tied=False)
    dense = job.original
    assert dense is not None

    def broken(dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        teacher = dense(dtype, device)
        teacher.get_input_embeddings().weight.data[40] = torch.nan
        return teacher

    with pytest.raises(NumericError, match="teacher_dtype: fp32"):
        Distill(**CACHED)(reads(job, broken))
