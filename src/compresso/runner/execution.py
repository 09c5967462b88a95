"""A prepared run, carried out: stage after stage, each saved once finished, and what they leave judged and written.

Launched in several processes (torchrun, accelerate), all of them run the stages, and the main one owns the folders.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator

from compresso.checkpoint.patched import weights_alone
from compresso.checkpoint.workfolder import WorkFolder
from compresso.data.template import apply_to_tokenizer_
from compresso.edit.patches import written
from compresso.engines.verify import parity_records
from compresso.errors import CollapseError, ResumeError
from compresso.job import Job
from compresso.metrics.guard import check_finite
from compresso.metrics.trust.questions import TrustQuestions
from compresso.report.stage_facts import filled_now
from compresso.runner.clock import Clock
from compresso.runner.evaluated import COMPRESSED, DENSE, PRUNED, FinalEvaluation
from compresso.runner.final_evaluation import Extent, take
from compresso.runner.first_job import dense_of, new_job, reader, saved_dense, with_weights
from compresso.runner.offload import offloaded_job, opened_offloaded
from compresso.runner.output import finish, gather, left, scored, state, stored_dtype
from compresso.runner.preflight import Prepared
from compresso.runner.rounds import Act, applied, entered, targets_of
from compresso.runner.rounds import left as left_round
from compresso.runner.rounds import told as rounds_told
from compresso.runner.saved_stages import save_stage
from compresso.runner.trust_check import TrustCheck
from compresso.stage import KeepsZeros, card
from compresso.tasks.base import Score
from compresso.training.launch import broadcast
from compresso.wording import worded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """What a run asks for beside its recipe; `compresso.run` describes them."""

    measure: Extent
    trust: TrustQuestions | None
    verify: bool
    overwrite: bool
    allow_collapsed: bool
    offload: bool
    over_memory: bool
    quiet: bool


class Execution:
    """A run between its checks and its checkpoints.

    Args:
        prepared: the run, checked; no weight has been read.
        wishes: what is asked beside its recipe.
        accelerator: of the processes that it is launched in.
        work: the folder that finished stages are saved in; those found there are not run again.
        clock: counts the time of the run and of its stages, over all pieces.
    """

    def __init__(
        self, prepared: Prepared, wishes: Wishes, accelerator: Accelerator, work: WorkFolder, clock: Clock
    ) -> None:
        self.prepared, self.wishes, self._work, self._clock = prepared, wishes, work, clock
        self._accelerator, self._is_main = accelerator, accelerator.is_main_process
        self._speaks = self._is_main and not wishes.quiet
        self._acts = prepared.recipe.acts
        self.targets = targets_of(self._acts)
        accelerator.wait_for_everyone()
        done = work.finished([act.folder for act in self._acts])
        wanting = (i for i, act in enumerate(self._acts) if act.target and not work.has_target(act.target))
        self._done = done[: next(wanting, len(done)) + 1]
        self._say()
        self.job = self._first_job()
        self._dense = dense_of(prepared, self._done)
        with self.job.progress().working("reading the weights"):
            self.job, self._before = with_weights(self.job, prepared, self._dense, self._done)
        if not self._done:
            self._check_zeros()
        self._score: Score | None = None
        self._after: Score | None = None
        if not self._before and not card(self._acts[0].name).makes_dense:
            self._score = scored(self.job, DENSE)
            self._before = state(self.job, self._score)

    def __call__(self) -> Mapping[str, Any]:
        """Run what is not done, and write; what the records say, of several targets those of the last.

        Raises:
            CompressoError: a stage cannot go on, or the guard refuses what it left; finished stages stay.
            Interrupted: SIGINT or SIGTERM came while a stage trained.
        """
        owed = self._acts[len(self._done) - 1].target if self._done else ""
        if owed and not self._work.has_target(owed):  # its stage had finished, and the guard refused it
            self._after = scored(self.job, COMPRESSED)
            self._write(self._work.target(owed), replaces=True)
        for index, act in enumerate(self._acts):
            if index >= len(self._done):
                self._run_stage(index, act)
        if self._after is None:  # no data, or a resumed run found all stages done
            self._after = scored(self.job, COMPRESSED)
        output = self.prepared.output
        facts = broadcast(
            self._accelerator, self._gather() if self.targets else self._write(output, self.wishes.overwrite)
        )
        self._clock.stop()
        if self._is_main:
            self._work.discard()
        if self.wishes.offload:
            self.job = replace(self.job, model=opened_offloaded(output, self.prepared))
        return facts

    def _say(self) -> None:
        """What was noticed on the way here; nothing refuses the run any more."""
        if not self._speaks:
            return
        for sentence in self.prepared.said:
            log.warning(sentence)
        for sentence in rounds_told(self._acts):
            log.info(sentence)
        for stage, sentence in self.prepared.lacking.items():
            log.warning("%s: %s", stage, sentence)
        source, task = self.prepared.source, self.prepared.recipe.task
        for sentence in weights_alone(source):
            log.warning("%s", sentence)
        if not self._done and task.lacks_head(source.config):
            log.warning("%s has no head for %s: %s makes a new one", source.name, task.name, self._acts[0].name)

    def _first_job(self) -> Job:
        """The job without its weights."""
        job = new_job(self.prepared, self._work.path, self.wishes.quiet)
        if not self.wishes.offload:
            return job
        if self._done:
            raise ResumeError(
                "the interrupted run has finished its stage in memory; resume it without --offload, or start anew with"
                " --overwrite"
            )
        return offloaded_job(job, self.prepared, over_memory=self.wishes.over_memory)

    def _check_zeros(self) -> None:
        """Refuse weights without zeros where a stage keeps some, before another has trained for hours."""
        for act in self._acts:
            if act.label in self.prepared.own_zeros and isinstance(act.stage, KeepsZeros):
                act.stage.check_zeros(self.job)

    def _run_stage(self, index: int, act: Act) -> None:
        """Run one stage, judge what it leaves, and save it."""
        label, received = act.label, self.job
        with self._clock.stage(label):
            job, stage, told = entered(received, act)
            entering = replace(job, out=self._work.training(act.folder))
            with job.progress().working(label):  # of a stage without steps that it shows itself
                job = left_round(applied(stage, entering, act), received, act, told)
            if not self.wishes.offload:  # a sweep looks at each weight it makes
                check_finite(job.model, label)
        job = job.note(label, **self._clock.of(label).facts(2))
        if (sentence := self.prepared.lacking.get(label)) is not None:
            job = job.note(label, lacking_kinds=sentence)
        makes_dense = card(act.name).makes_dense
        self._after = scored(job, DENSE if makes_dense else COMPRESSED)
        self.job = job = job.note(label, left=left(job, self._after, self.prepared.corpus()))
        if self._speaks and (emptied := filled_now(job.records, label)):
            log.warning(
                "%s changed weights behind %s and filled its zeros: sparse_finetune trains and keeps them",
                label,
                emptied,
            )
        if makes_dense:
            self._score, self._before = self._after, state(job, self._after)
        self._accelerator.wait_for_everyone()  # others may still read what the stage left in its folder
        if self._is_main and not self.wishes.offload:  # the journal of an offloaded sweep holds what is done
            self._work.save_stage(index, act.folder, partial(save_stage, job, self._before, whole=makes_dense))
            self._clock.finished(label)
        if act.target:
            self._write(self._work.target(act.target), replaces=True)
        self._accelerator.wait_for_everyone()
        if makes_dense:
            self._dense = saved_dense(self.prepared, self._work.stage(index, act.folder))
            self.job = replace(self.job, original=reader(self._dense))

    def _write(self, at: Path, replaces: bool) -> dict[str, Any]:
        """Judge the model as it is and write it as a checkpoint; what its records say."""
        job, prepared, dense = self.job, self.prepared, self._dense
        if prepared.prompt is not None and job.tokenizer is not None:
            job = replace(job, tokenizer=copy.deepcopy(job.tokenizer)) if self.targets else job
            apply_to_tokenizer_(cast(Any, job.tokenizer), prompt_on=True)
        facts = {
            **prepared.origin(),
            "before": self._before,
            "after": state(job, self._after),
            "stages": dict(job.records),
            "patches": written(job.patches),
            "dense": None if dense is prepared.source else asdict(dense.identity),
        }
        if not self._is_main:
            return facts
        evaluation = self._evaluated(job, facts, at)
        self._refuse_collapse(evaluation)
        facts |= self._clock.run().facts(1)
        dtype = stored_dtype(prepared.source)
        ask, carried = partial(_asked, job) if self.wishes.verify else None, prepared.source.folder
        with job.progress().working("writing the checkpoint and opening it again"):
            return finish(job, facts, evaluation, dense, prepared.layout, at, replaces, dtype, ask, carried)

    def _gather(self) -> dict[str, Any]:
        """All targets side by side in the output; what the records of the last say."""
        if not self._is_main:
            return {}
        return gather(
            {name: self._work.target(name) for name in self.targets}, self.prepared.output, self.wishes.overwrite
        )

    def _evaluated(self, job: Job, facts: Mapping[str, Any], at: Path) -> FinalEvaluation:
        """Results of the dense model and the smaller one, and the verdict."""
        prepared, answers = self.prepared, self._work.path / "trust"
        answers = answers / at.name if self.targets else answers
        questions = self.wishes.trust
        return take(
            job,
            self._dense,
            corpus=prepared.corpus(),
            instructions=prepared.records is not None and prepared.records.kind != "text",
            prompt_on=prepared.prompt is not None,
            before=facts["before"]["held_loss"],
            after=facts["after"]["held_loss"],
            extent=self.wishes.measure,
            scores={DENSE: self._score, PRUNED: self._after},
            trust=None if questions is None else TrustCheck(questions, answers),
        )

    def _refuse_collapse(self, evaluation: FinalEvaluation) -> None:
        """Say what the guard found. Raises CollapseError if it refuses and that was not allowed, with what was tried
        and one text of each model; the finished stages stay for a resume.
        """
        guard = evaluation.guard
        if guard.verdict == "refuse" and not self.wishes.allow_collapsed:
            raise CollapseError(
                f"{guard.message()} Tried: {self.prepared.recipe.name}.{evaluation.example()} The finished stages are"
                " kept: --resume --allow-collapsed writes this result without training again"
            )
        if guard.verdict in ("warn", "refuse") and not self.wishes.quiet:
            log.warning(guard.message())


def _asked(job: Job, folder: Path) -> Sequence[Mapping[str, Any]]:
    """What every engine makes of a written folder."""
    asking = worded("asking the engines of this machine (--no-verify leaves it out)", ("verify",))
    with job.progress().working(asking):
        return parity_records(folder)
