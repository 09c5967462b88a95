"""The report that a run ends with: the dense model and the smaller one, evaluated in the same way on the same machine,
at the same time.

The dense model is read once more for it, beside the smaller one. Where both do not fit into memory, what needs the
dense model is left out and the report says why. Nothing here changes the result; it decides whether the result may be
written (`FinalEvaluation.guard`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.core.counted import counted
from compresso.core.row import Row
from compresso.edit.stock import as_stock
from compresso.errors import CompressoError
from compresso.job import Job
from compresso.metrics.divergence import divergence, reference
from compresso.metrics.forward import context_of
from compresso.metrics.frames import frame_measurements
from compresso.metrics.generation import generation_measurements, samples
from compresso.metrics.guard import Guard
from compresso.metrics.latency import speed_measurements
from compresso.metrics.record import Environment, Measurement
from compresso.metrics.segmented import segmented
from compresso.metrics.segments import SegmentScore
from compresso.runner.budgeted_time import obstacle, predicted, timed
from compresso.runner.evaluated import COMPRESSED, DENSE, PRUNED, Evaluated, FinalEvaluation
from compresso.runner.evaluation_settings import EvaluationSettings, evaluation_settings
from compresso.runner.picture_memory import picture_memory
from compresso.runner.trust_check import TrustCheck, trust_found
from compresso.sweep.memory import available
from compresso.tasks.base import Score
from compresso.training.progress import PATIENCE, Progress

QUICK_NEW_TOKENS = 24
"""Of each text that a quick evaluation writes, at most."""
SPEED_PROMPT, SPEED_NEW, SPEED_ROUNDS = 64, 32, 5
ASKED = "the run was asked not to measure it"
OFFLOADED = "weights were read from disk block by block, which takes a pass over the files for each token"
LARGE = 1_000_000_000
"""Parameters from which speed is measured over fewer tokens and rounds: on a CPU each token of such a model takes
seconds.
"""


Extent = Literal["none", "quick", "full"]
"""How much of both models is measured: the loss on held-out examples alone; with short texts, which the guard reads;
with longer texts, divergence and speed.
"""


def take(
    job: Job,
    source: Source,
    *,
    corpus: str,
    instructions: bool,
    prompt_on: bool,
    before: float | None,
    after: float | None,
    extent: Extent = "full",
    scores: Mapping[str, Score | None] | None = None,
    trust: TrustCheck | None = None,
) -> FinalEvaluation:
    """Evaluate both models and judge.

    Args:
        job: with the smaller model, live.
        source: of the dense model.
        corpus: name of the training data.
        instructions, prompt_on: whether it was trained on instructions, and with the collaborative prompt.
        before, after: losses on the held-out examples, nats a token; None without data.
        extent: how much is measured.
        scores: of both models on the held-out examples, as far as they are known.
        trust: how much of trust is measured; None for nothing.

    Raises:
        NumericError: a model gives NaN.
    """
    shown = job.progress()
    kept = job.plan.kept.get("vocab")
    # a model whose vocabulary was cut reads and writes with a tokenizer of its own
    theirs = job.tokenizer if kept is None or job.tokenizer is None else load_tokenizer(source)
    tokenizers = [job.tokenizer, theirs] if job.task.writes_text else []
    settings = evaluation_settings(job.model, tokenizers, corpus=corpus, instructions=instructions, prompt_on=prompt_on)
    if extent != "full":
        settings = replace(settings, new_tokens=min(settings.new_tokens, QUICK_NEW_TOKENS))
    if extent == "none":
        settings = replace(settings, prompts=(), refused=ASKED)
    results = {DENSE: Evaluated(), PRUNED: Evaluated()}
    pruned = job.model.eval()
    if job.offloaded:
        settings = replace(settings, prompts=(), refused=OFFLOADED)
    if lacking := OFFLOADED if job.offloaded else _lacking(source, job.device, pruned.dtype):
        results[DENSE].not_measured[job.task.metric] = lacking
        if job.task.writes_text:
            results[DENSE].not_measured |= {"texts": lacking, "speed": lacking}
            results[PRUNED].not_measured |= {"speed": lacking, "kl": lacking}
        models = {PRUNED: pruned}
    else:
        with shown.working("reading the dense model once more"):
            dense = as_stock(load_model(source, dtype=pruned.dtype, device=job.device)).eval()
        models = {DENSE: dense, PRUNED: pruned}
    known = dict(scores or {})
    if job.dense_held is not None:  # its examples are others since tokens left
        known.pop(DENSE, None)
    with job.weights.whole():
        for name, model in models.items():
            tokenizer = theirs if name == DENSE else job.tokenizer
            _evaluate(results[name], model, job, tokenizer, settings, known.get(name), is_dense=name == DENSE)
    if DENSE in models and job.task.writes_text and extent != "full":
        results[DENSE].not_measured["speed"] = ASKED
        results[PRUNED].not_measured |= {"speed": ASKED, "kl": ASKED}
    elif DENSE in models and job.task.writes_text:
        windows = shared_windows(job.dense_held or job.held, kept)
        if windows:
            with shown.working("comparing the distributions of both models"):
                results[PRUNED].measurements += divergence(
                    pruned, reference(models[DENSE], windows, corpus=corpus), kept=kept
                )
        elif job.held:
            results[PRUNED].not_measured["kl"] = "no held-out example begins with two tokens that both models have"
        for name, speeds in _speeds(models, shown).items():
            results[name].measurements += speeds
    if DENSE in models and not job.task.reads_text and extent == "full":
        with shown.working("timing frames of both models"):
            for name, frames in frame_measurements(models).items():
                results[name].measurements += frames
        with shown.working("measuring the memory of both models"):
            for name, model in models.items():
                _add_memory(results[name], model)
    elif not job.task.reads_text:
        results[PRUNED].not_measured |= {"frames": lacking or ASKED, "memory": lacking or ASKED}
    if job.measures.latency is not None:
        _add_times(results, job, source, models, extent)
    if DENSE in models and kept is not None and before is not None:  # examples may have been dropped since
        before = job.task.score(models[DENSE], job.dense_held or job.held).mean
    guard = job.task.judge(
        pruned.config, results[DENSE].numbers(before, len(job.held)), results[PRUNED].numbers(after, len(job.held))
    )
    if trust is not None:
        _add_trust(results, job, trust, models, {DENSE: theirs, PRUNED: job.tokenizer}, guard, prompt_on)
    return FinalEvaluation(results[DENSE], results[PRUNED], guard)


def _add_memory(result: Evaluated, model: PreTrainedModel) -> None:
    """What a process takes that reads one picture, or why that is not known."""
    try:
        result.measurements += (picture_memory(model),)
    except CompressoError as error:
        result.not_measured["memory"] = str(error)


def _add_trust(
    results: Mapping[str, Evaluated],
    job: Job,
    check: TrustCheck,
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase | None],
    guard: Guard,
    prompt_on: bool,
) -> None:
    """What became of trust, with its numbers; the reason where the dense model is not at hand."""
    known = {name: (model, tokenizer) for name, model in models.items() if (tokenizer := tokenizers[name]) is not None}
    if len(known) < len(results):
        results[PRUNED].not_measured["trust"] = str(results[DENSE].not_measured.get("texts", "no tokenizer"))
        return
    found = trust_found(job, check, known, guard, prompt_on)
    for name, mine in results.items():
        mine.measurements += found.measurements[name]
        mine.not_measured |= found.not_measured[name]
    results[PRUNED].changes += found.changes


def _add_times(
    results: Mapping[str, Evaluated], job: Job, source: Source, models: Mapping[str, PreTrainedModel], extent: Extent
) -> None:
    """What a forward of both models takes by the table of the run's budget, and as it is timed here."""
    table = job.measures.latency
    assert table is not None  # the run has such a budget
    for name, one in zip((DENSE, PRUNED), predicted(table, source, job.plan), strict=True):
        results[name].measurements.append(one)
    lacking = ASKED if extent == "none" else "" if DENSE in models else str(results[PRUNED].not_measured.get("speed"))
    if not (lacking := lacking or obstacle(table, job.device)):
        with job.progress().working("timing both models as the table of the budget was"):
            for name, measured in timed(table, models, job.tokenizer).items():
                results[name].measurements.append(measured)
        return
    results[PRUNED].not_measured["time"] = lacking


def shared_windows(rows: Sequence[Row], kept: Sequence[int] | None) -> list[list[int]]:
    """Ids of examples as far as both models have their tokens; kept: ids that the smaller model has, None for all."""
    if kept is None:
        return [list(row["input_ids"]) for row in rows]
    staying = set(kept)
    windows = [list(takewhile(staying.__contains__, row["input_ids"])) for row in rows]
    return [window for window in windows if len(window) > 1]


def _evaluate(
    results: Evaluated,
    model: PreTrainedModel,
    job: Job,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: EvaluationSettings,
    score: Score | None,
    *,
    is_dense: bool,
) -> None:
    """Held-out loss and texts of one model, added to its results."""
    here, shown = Environment.here(model.device, model.dtype), job.progress()
    whose = DENSE if is_dense else COMPRESSED
    if job.held:
        rows = job.dense_held if is_dense and job.dense_held is not None else job.held
        if score is None:
            with shown.working(f"scoring {counted(len(rows), 'held-out example')}, {whose} model"):
                score = job.task.score(model, rows, job.dense_held)
        results.measurements += score.measurements(here, settings.corpus, noise=is_dense)
        if isinstance(score, SegmentScore):
            results.segmented = segmented(model, rows, lambda some: job.task.collate(some, 0), score.names)
    else:
        results.not_measured[job.task.metric] = "no examples were held out" if job.rows else "the run had no data"
    if not job.task.writes_text:
        return
    if settings.refused or tokenizer is None:
        results.not_measured["texts"] = settings.refused
        return
    encode = None if settings.encode is None else partial(settings.encode, tokenizer)
    with shown.running(len(settings.prompts), 0, f"texts, {whose} model", PATIENCE):
        advance = lambda texts, tokens: shown.step(texts, f"texts, {whose} model", {}, tokens)  # noqa: E731
        results.samples = samples(model, tokenizer, settings.prompts, settings.new_tokens, encode, advance)
    protocol = {"max_new_tokens": settings.new_tokens, "prompt_format": settings.prompt_format}
    results.measurements += generation_measurements(results.samples, here, **protocol)


def _speeds(models: Mapping[str, PreTrainedModel], shown: Progress) -> dict[str, tuple[Measurement, ...]]:
    """Speed of both models in turn, at batch 1."""
    context = context_of(models[DENSE])
    large = sum(p.numel() for p in models[DENSE].parameters()) >= LARGE
    new = SPEED_NEW // 2 if large else SPEED_NEW
    if context is not None:
        new = min(new, max(1, context // 2))
    prompt = SPEED_PROMPT if context is None else min(SPEED_PROMPT, context - new)
    rounds = 3 if large else SPEED_ROUNDS
    turns = len(models) * (rounds + 1)  # one of each model warms up
    begun = iter(range(turns))
    with shown.running(turns, 0, "speed", PATIENCE):
        advance = lambda what: shown.step(next(begun), f"speed, {what.replace(PRUNED, COMPRESSED)}", {}, 0)  # noqa: E731
        return speed_measurements(models, (1,), prompt, new, rounds, advance=advance)


def _lacking(source: Source, device: torch.device, dtype: torch.dtype) -> str:
    """Why the dense model cannot be read beside the smaller one; "" if it can."""
    needed = sum(math.prod(tensor.shape) for tensor in source.tensors.values()) * dtype.itemsize
    free = available(device)
    if needed * 1.2 <= free:  # a fifth more for activations
        return ""
    return (
        f"the dense model needs {needed / 1e9:.1f} GB beside the smaller one, and {free / 1e9:.1f} GB are free on"
        f" {device}"
    )
