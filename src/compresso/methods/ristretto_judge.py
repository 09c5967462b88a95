"""Candidates as whole smaller models: built apart, repaired by choice, and compared with dense on rows of their own."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from transformers import PreTrainedModel

from compresso.core.row import Row
from compresso.errors import NumericError
from compresso.job import Job
from compresso.methods.repair import Repair
from compresso.metrics.divergence import DenseReference, divergence, reference
from compresso.metrics.repeats import first_that_writes, repetition_of
from compresso.solve.level_choice import Levels
from compresso.training.rounds import RoundJournal

NEW_TOKENS = 48
"""Of each text that a candidate writes."""


class Build(Protocol):
    """Turns a job's model into the smaller one."""

    def __call__(self, job: Job, levels: Levels) -> Job:
        """The job at these levels."""
        ...


class Judge:
    """Builds candidates apart from the model and notes how far they are from dense and what they write.

    Args:
        build: the smaller model, in a job whose model may be changed.
        repair: behind it; None judges models as they are built.
        job: with the rows that repairs may see; its model stays as it is.
        rows: to judge by.
        texts: of these, continued to look for repetition.
        journal: of what was judged, in order; None keeps none.
    """

    def __init__(
        self,
        build: Build,
        repair: Repair | None,
        job: Job,
        rows: Sequence[Row],
        texts: int,
        journal: RoundJournal | None,
    ) -> None:
        self._build, self._repair, self._job, self._rows, self._texts = build, repair, job, rows, texts
        self._journal = journal
        self._known: list[Any] = [] if journal is None else journal.entries()
        self._reference: DenseReference | None = None
        self.seen: dict[Levels, dict[str, Any]] = {}

    @property
    def best(self) -> Levels:
        """The nearest to dense. Raises NumericError if predictions of all of them overflow."""
        nearest = min(self.seen, key=self._distance)
        if self.seen[nearest]["divergence"] is None:
            raise NumericError(
                f"all {len(self.seen)} candidates overflow on the rows that judge; use float32 or bfloat16, or raise"
                " keep"
            )
        return nearest

    def _distance(self, levels: Levels) -> float:
        value = self.seen[levels]["divergence"]
        return math.inf if value is None else value

    def __call__(self, levels: Levels) -> None:
        """Judge a candidate, unless it was judged before."""
        if levels in self.seen:
            return
        n = len(self.seen)
        if n < len(self._known):
            self.seen[levels] = self._known[n]
            return
        folder = self._job.out / f"judged-{n:06d}"
        apart = replace(self._job, model=copy.deepcopy(self._job.model), out=folder)
        smaller = self._build(apart, levels)
        if self._repair is not None:
            smaller = self._repair(smaller)
        divergence = self._divergence(smaller.model)
        sound = divergence is not None  # of one that overflows there is neither a loss nor a text
        found = {
            "divergence": divergence,
            "loss": float(self._job.task.score(smaller.model, self._rows).mean) if sound else None,
            "repetition": self._repetition(smaller.model) if sound else 1.0,
        }
        self.seen[levels] = self._job.ranks.agreed(found)
        if self._journal is not None:
            self._journal.append(self.seen[levels])

    def taken(self, repeats: float) -> tuple[Levels, int]:
        """The best candidate that repeats itself at most so much more than the dense model, and its place in the order
        of judging. Raises NumericError as `best`.
        """
        _ = self.best
        ranked = sorted(self.seen, key=self._distance)
        most = self._job.ranks.agreed(self._repetition(self._job.model)) + repeats
        place, _ = first_that_writes((self.seen[levels]["repetition"] for levels in ranked), most)
        return ranked[place], list(self.seen).index(ranked[place])

    def _divergence(self, model: PreTrainedModel) -> float | None:
        """Mean KL(dense || model) in nats a token; None where it is not finite."""
        if self._reference is None:
            texts = [row["input_ids"] for row in self._rows]
            self._reference = reference(self._job.model, texts, corpus="judged", batch_size=1)
        try:
            return divergence(model, self._reference)[0].value
        except NumericError:
            return None

    def _repetition(self, model: PreTrainedModel) -> float:
        """Of what a model writes; 0 where it is not asked."""
        texts = [row["input_ids"] for row in self._rows if len(row["input_ids"]) > 1][: self._texts]
        if self._job.tokenizer is None or not texts:
            return 0.0
        return repetition_of(model, self._job.tokenizer, texts, NEW_TOKENS)
