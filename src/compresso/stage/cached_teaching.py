"""A teacher that is asked once, before its student learns: what it says of the training examples goes to disk, and it
is released.

Teacher and student are never in memory together: while the teacher answers, the student's weights are on disk too. What
is kept of a distribution is less than all of it (`core.buckets`), so a few held-out places are kept whole, and how much
the divergence lacks there is measured.
"""

import gc
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.buckets import bucket_divergences, merged, strongest
from compresso.core.distillation import Divergence
from compresso.core.row import Row
from compresso.errors import NumericError, RecipeError, ResourceError
from compresso.job import Job
from compresso.stage.tuning import frozen_teacher
from compresso.training.halves import Compared, Halves, Tokens, refuse_other_outcomes
from compresso.training.halving import free
from compresso.training.order import ShuffledBatches
from compresso.training.parked import parked_
from compresso.training.teacher_store import Taught, TeacherStore, bytes_of

HELD_EXAMPLES, HELD_PLACES = 16, 8
"""Held-out examples that are kept whole at so many places each, at most."""
GAP_PLACES = HELD_EXAMPLES * HELD_PLACES


@dataclass(frozen=True)
class Question:
    """What a teacher is asked.

    Args:
        top: how many outcomes of each place are kept by themselves.
        temperature: its logits are divided by it.
        tokens: which places are asked for.
        examples: that it reads at once.
        chunk: tokens whose logits exist at a time.
        dtype, device: as for `frozen_teacher`.
    """

    top: int
    temperature: float
    tokens: Tokens
    examples: int
    chunk: int
    dtype: Literal["same", "bf16", "fp32"]
    device: Literal["same", "cpu"]


class CachedTeacher:
    """What a job's dense model says of the rows that a training will see, and whole of a few that were held out.

    Args:
        job: whose model is the student; not called, and empty while the teacher answers.
        same: from `Job.same`: what a resume must agree on.
        question: what is asked.
        rows: places in the job's rows of those that will be seen, ascending.
    """

    def __init__(self, job: Job, same: Mapping[str, Any], question: Question, rows: Sequence[int]) -> None:
        """Nothing is asked yet.

        Raises:
            RecipeError: a task that no teacher is kept for.
        """
        if not job.task.writes_text:
            raise RecipeError(
                f"teacher=cached keeps next-token distributions, and this run's task is {job.task.name}; give"
                " teacher: live"
            )
        self._job, self._question = job, question
        self._outcomes = job.task.halves(job.model, ()).outcomes
        counts = [len(self._places([job.rows[row]])[0]) for row in rows]
        held = [i for i, row in enumerate(job.held) if self._places([row])[0]][:HELD_EXAMPLES]
        self._held = [job.held[i] for i in held]
        named = {**same, "rows": _digest([job.rows[row] for row in rows]), "held": _digest(self._held)}
        folder = job.out / "teacher"
        self.store = TeacherStore(folder / "training", named, rows, counts)
        self._whole = TeacherStore(folder / "held", named, held, [len(chosen) for chosen in self._few(self._held)])
        self._parked = job.ranks.own(folder) / "student.safetensors"
        self._rows = {**{(0, row): job.rows[row] for row in rows}, **{(1, i): job.held[i] for i in held}}
        self._n_places = sum(counts)

    def facts(self) -> dict[str, Any]:
        """What is kept, for the records."""
        return {
            "top": min(self._question.top, self._outcomes),
            "examples": sum(len(chunk) for chunk in self.store.chunks),
            "places": self._n_places,
            "bytes": bytes_of(self._n_places, self._question.top, self._outcomes),
        }

    def ask(self) -> None:
        """Have everything on disk: the teacher is read if anything is missing, answers, and is released. Several
        processes ask a teacher each, for a share of the chunks, and read all of them.

        Raises:
            ResumeError: another training's answers are there.
            ResourceError: the disk is too small.
            RecipeError: the teacher decides among other outcomes.
            ArchError: it cannot be cut in halves.
            NumericError: its logits are not finite.
            CheckpointError: the job does not know where from to read it.
        """
        ranks, missing, whole = self._job.ranks, list[int](), list[int]()
        with ranks.failing_alike():
            if ranks.is_main:
                missing, whole = self.store.missing(), self._whole.missing()
                if missing or whole:
                    self._check_room(ranks.n)
                    self.store.begin()
                    self._whole.begin()
        missing, whole = ranks.agreed((missing, whole))
        if not missing and not whole:
            return
        with ranks.failing_alike(), parked_(self._job.model, self._parked):
            self._answer(ranks.mine(missing), ranks.mine(whole))
            gc.collect()  # modules may refer to each other
            free()

    @torch.no_grad()
    def gap(self, model: PreTrainedModel, kind: Divergence, beta: float) -> dict[str, float] | None:
        """The divergence of a model from the teacher at the held-out places: "full" over all outcomes, "cached" over
        what is kept of them, "gap", the rest that the loss does not see, all in nats a place, times temperature^2; None
        where nothing was held out.

        The model's mode is put back.
        """
        if not self._held:
            return None
        modes = {module: module.training for module in model.modules()}
        model.eval()
        sums, halves = [0.0, 0.0], self._job.task.halves(model, ())
        for row, chosen, i in zip(self._held, self._few(self._held), self._whole_rows(), strict=True):
            last, at = self._read(halves, [row])
            logits = halves.logits(last[at.places.to(last.device)][chosen]).double()
            taught = self._whole.read([i])
            outcomes = taught.outcomes.to(logits.device, torch.int64)
            log_probs = taught.log_probs.to(logits.device).double()
            for which, n in enumerate((self._outcomes, self._question.top)):
                given = outcomes[:, :n], merged(log_probs, n)
                each = bucket_divergences(logits, *given, kind, self._question.temperature, beta)
                sums[which] += float(each.sum())
        for module, mode in modes.items():
            module.training = mode
        full, cached = (one / sum(map(len, self._few(self._held))) for one in sums)
        return {"full": full, "cached": cached, "gap": full - cached}

    def held_facts(self) -> dict[str, Any]:
        """How many places `gap` is measured at, and the mean probability that the teacher gives to the rest there."""
        rest = [self._whole.read([i]).log_probs[:, self._question.top :].exp().sum(-1) for i in self._whole_rows()]
        if not rest:
            return {"places": 0}
        return {"places": sum(map(len, rest)), "rest": float(torch.cat(rest).double().mean())}

    def _whole_rows(self) -> list[int]:
        return [i for chunk in self._whole.chunks for i in chunk]

    @torch.no_grad()
    def _answer(self, missing: Sequence[int], whole: Sequence[int]) -> None:
        """Write chunks of both stores."""
        question = self._question
        teacher = self._job.task.halves(frozen_teacher(self._job, question.dtype, question.device), ())
        refuse_other_outcomes(self._outcomes, teacher)
        teacher.check()
        for number in whole:
            rows = [self._rows[1, i] for i in self._whole.chunks[number]]
            self._whole.write(number, self._answers(teacher, rows, self._few(rows), self._outcomes))
        n = len(missing)
        shown = self._job.progress()
        shown.say(f"teacher: {self._n_places:,} places, {self.facts()['bytes'] / 1e6:,.1f} MB on disk")
        with shown.running(n, 0, "teacher"):
            for done, number in enumerate(missing, 1):
                rows = [self._rows[0, row] for row in self.store.chunks[number]]
                answers = self._answers(teacher, rows, self._places(rows), question.top)
                self.store.write(number, answers)
                shown.step(done, "teacher", {}, sum(len(row["input_ids"]) for row in rows))

    def _answers(self, teacher: Halves, rows: Sequence[Row], chosen: Sequence[list[int]], top: int) -> list[Taught]:
        """What it says of some rows, at the chosen ones of the places of each that count."""
        found: list[Taught] = []
        for start in range(0, len(rows), self._question.examples):
            some = slice(start, start + self._question.examples)
            last, at = self._read(teacher, rows[some])
            parts = last[at.places.to(last.device)].split(at.places.sum(-1).tolist())
            wanted = torch.cat([part[here] for part, here in zip(parts, chosen[some], strict=True)])
            pieces = [
                strongest(teacher.logits(piece), top, self._question.temperature)
                for piece in wanted.split(self._question.chunk)
            ]
            outcomes, log_probs = (torch.cat([piece[i] for piece in pieces]).cpu() for i in (0, 1))
            if not log_probs.isfinite().all():
                raise NumericError(
                    "the dense model's logits are not finite on the training examples; give teacher_dtype: fp32"
                )
            sizes = [len(here) for here in chosen[some]]
            split = zip(outcomes.int().split(sizes), log_probs.float().split(sizes), strict=True)
            found += [Taught(*one) for one in split]
        return found

    def _read(self, halves: Halves, rows: Sequence[Row]) -> tuple[Tensor, Compared]:
        batch = self._job.collated(rows)
        return halves.read(batch)[0], self._job.task.compare(batch, self._question.tokens)

    def _places(self, rows: Sequence[Row]) -> list[list[int]]:
        """All places of each row that count, numbered."""
        compare, tokens = self._job.task.compare, self._question.tokens
        return [list(range(int(compare(self._job.collated([row]), tokens).places.sum()))) for row in rows]

    def _few(self, rows: Sequence[Row]) -> list[list[int]]:
        """Some of them, evenly spaced."""
        return [
            sorted({i * len(here) // HELD_PLACES for i in range(HELD_PLACES)} if here else ())
            for here in self._places(rows)
        ]

    def _check_room(self, students: int) -> None:
        """Raise ResourceError if the disk has no room for what will be written."""
        student = sum(one.numel() * one.element_size() for one in self._job.model.state_dict().values())
        needed = self.facts()["bytes"] + students * student + bytes_of(GAP_PLACES, self._outcomes, self._outcomes)
        there = next(folder for folder in self._parked.absolute().parents if folder.exists())
        if (room := shutil.disk_usage(there).free) < needed:
            raise ResourceError(
                f"teacher=cached writes about {needed / 1e9:.2f} GB, and the disk of {there} has {room / 1e9:.2f} GB;"
                " give a smaller teacher_top, fewer steps, or another output"
            )


def rows_seen(batches: ShuffledBatches, total: int, n_rows: int) -> list[int]:
    """Places in the data of the rows that `total` updates see, ascending."""
    seen: set[int] = set()
    for update in range(total):
        seen.update(batches.indices(update, range(batches.global_batch)))
        if len(seen) == n_rows:
            break
    return sorted(seen)


def _digest(rows: Sequence[Row]) -> str:
    """sha256 of ids and labels."""
    return hashlib.sha256(repr([(list(row["input_ids"]), list(row["labels"])) for row in rows]).encode()).hexdigest()
