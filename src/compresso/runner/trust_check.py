"""Trust before and after a run that asks for it: both models, live, are asked the same, and the report says what
became of each dimension.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.errors import DataError
from compresso.job import Job
from compresso.metrics.guard import Guard
from compresso.metrics.record import Change, Environment, Measurement
from compresso.metrics.tasks.ready import data_folder
from compresso.metrics.trust.asking import ModelRespondent
from compresso.metrics.trust.data import FOLDER, TrustData
from compresso.metrics.trust.journal import Journal, Journalled
from compresso.metrics.trust.questions import QUICK, QUICK_WRITTEN, Extent, TrustQuestions, questions_of
from compresso.metrics.trust.soundness import broken_by_guard, broken_by_texts, heard
from compresso.metrics.trust.suite import Outcome, answered, trust_changes, trust_measurements
from compresso.tasks.base import Task

Trust = Literal["none", "quick", "full"]
"""How much of trust a run measures: nothing; a few questions of each dimension; all of them. Choices are weighed."""


@dataclass(frozen=True)
class TrustCheck:
    """What a run was asked.

    Args:
        questions: of both models, read before weights.
        answers: folder that keeps each answer until the run has ended; None keeps none.
    """

    questions: TrustQuestions
    answers: Path | None = None


def extent_of(trust: Trust, seed: int) -> Extent:
    """How much is asked, in the words of the suite."""
    if trust == "quick":
        return Extent(limit=QUICK, written=QUICK_WRITTEN, seed=seed)
    return Extent(seed=seed)


@dataclass(frozen=True)
class TrustFound:
    """Numbers of each model by its name, why others are missing, and what changed."""

    measurements: Mapping[str, list[Measurement]]
    not_measured: Mapping[str, dict[str, str]]
    changes: list[Change]


def trust_questions(trust: Trust, seed: int = 0) -> TrustQuestions | None:
    """What both models will be asked, read before anything else of a run; None where nothing is asked.

    Raises:
        DataError: COMPRESSO_DATA names no folder, or a file in it is of another form.
    """
    return None if trust == "none" else questions_of(TrustData(data_folder(None, FOLDER)), extent_of(trust, seed))


def refuse_trust(extent: Trust, task: Task, has_tokenizer: bool, offload: bool) -> None:
    """Raise DataError, before weights are read, where a run could not measure what it is asked to."""
    if extent == "none":
        return
    if not task.writes_text:
        raise DataError(f"--trust {extent} asks models that write text, and those of task '{task.name}' do not")
    if not has_tokenizer:
        raise DataError(f"--trust {extent} asks in words, and the model has no tokenizer; add its files")
    if offload:
        raise DataError(
            f"--trust {extent} asks models in memory, and --offload reads weights from disk; ask the result afterwards"
            " by `compresso evaluate --against`"
        )


def trust_found(
    job: Job,
    check: TrustCheck,
    models: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    guard: Guard,
    prompt_on: bool,
) -> TrustFound:
    """Both models in every dimension, and what became of it.

    Args:
        job: of the run, for its seed, identity and display.
        check: what was asked.
        models: the dense one first, then the smaller one, live, each with its tokenizer.
        guard: whether the run's result is sound by its loss and texts.
        prompt_on: whether the smaller model was pruned with the collaborative prompt, which then both are given.

    Raises:
        NumericError: a model gives NaN.
    """
    extent = check.questions.extent
    outcomes: dict[str, list[Outcome]] = {}
    numbers: dict[str, list[Measurement]] = {}
    lacking: dict[str, dict[str, str]] = {}
    for name, (model, tokenizer) in models.items():
        asked = Journalled(
            ModelRespondent(model, tokenizer, prompt_on), _journal(job, check, name), job.progress(), f"trust, {name}"
        )
        outcomes[name] = answered(asked, check.questions)
        here = Environment.here(model.device, model.dtype)
        numbers[name], lacking[name] = trust_measurements(outcomes[name], here, extent)
    dense, smaller = outcomes.values()
    broken = broken_by_guard(guard) or _by_loss(job, models)
    return TrustFound(numbers, lacking, trust_changes(dense, smaller, broken))


def _by_loss(job: Job, models: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> str:
    """Whether the smaller model lost what the dense one knows; of one whose tokens are others the growth on plain
    sentences is not known.
    """
    (model, tokenizer), (small, its) = models.values()
    dense = heard(model, tokenizer)
    return broken_by_texts(dense, heard(small, its, dense=dense), "vocab" not in job.plan.kept)


def _journal(job: Job, check: TrustCheck, name: str) -> Journal | None:
    """Where a model's answers are kept: in another file where other questions are asked, as of files that changed."""
    if check.answers is None:
        return None
    asked = hashlib.sha256(repr(check.questions.requests()).encode()).hexdigest()[:12]
    run = hashlib.sha256(json.dumps(dict(job.identity), sort_keys=True, default=str).encode()).hexdigest()
    return Journal(check.answers / f"{name}-{asked}.jsonl", {"run": run, "model": name})
