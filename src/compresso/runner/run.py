"""The job from a model and a recipe to a checkpoint that loads, with its records.

Everything that can be wrong is checked first (`preflight`); weights are read last. Each finished stage is saved in a
work folder beside the output; the result is renamed into place at the end, after a fresh process has reopened it.
Launched in several processes (torchrun, accelerate), all of them run the stages, and the main one owns the folders.
"""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.source import Source
from compresso.checkpoint.workfolder import WorkFolder
from compresso.core.plan import Plan
from compresso.data.template import apply_to_tokenizer_
from compresso.door import public
from compresso.edit.patches import written
from compresso.engines.verify import parity_records
from compresso.errors import CollapseError, ResumeError, deprecated
from compresso.job import Job
from compresso.metrics.guard import check_finite
from compresso.report.stage_facts import filled_now
from compresso.runner.asked_budget import said_as_asked
from compresso.runner.drawn import drawn
from compresso.runner.evaluated import DENSE, PRUNED, FinalEvaluation
from compresso.runner.final_evaluation import Extent, take
from compresso.runner.first_job import dense_of, named, new_job, progress_bars, reader, saved_dense, with_weights
from compresso.runner.offload import offloaded_job, opened_offloaded
from compresso.runner.options import with_options
from compresso.runner.output import finish, gather, left, scored, state, stored_dtype
from compresso.runner.preflight import Prepared, check_shapes, prepare
from compresso.runner.rounds import applied, entered, targets_of
from compresso.runner.rounds import left as left_round
from compresso.runner.rounds import told as rounds_told
from compresso.runner.saved_stages import save_stage
from compresso.runner.trust_check import Trust, TrustCheck, refuse_trust
from compresso.stage import card, refuse_together
from compresso.tasks.base import Score
from compresso.training.launch import broadcast, new_accelerator, processes, whole_weights
from compresso.wording import worded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run hands back.

    Args:
        model: the smaller model, live.
        tokenizer: with the prompt in its chat template if the model was pruned with one; None for a model without
            tokenizer.
        plan: everything removed, in terms of the original model.
        records: what records.json holds.
        folder: the checkpoint; of a family of targets, that of the last.
        family: name -> checkpoint of each target; empty without targets.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    plan: Plan
    records: Mapping[str, Any]
    folder: Path
    family: Mapping[str, Path] = field(default_factory=dict[str, Path])


@public
def run(
    recipe: str | Path | Mapping[str, Any],
    model: str | Path | PreTrainedModel,
    data: str | Path | None = None,
    *,
    output: str | Path,
    keep: float | None = None,
    parameters: str | float | None = None,
    macs: float | None = None,
    milliseconds: float | None = None,
    speedup: str | float | None = None,
    latency_table: str | Path | None = None,
    memory: str | None = None,
    bytes_at_context: int | None = None,
    max_steps: int | None = None,
    sets: Sequence[str] = (),
    target: str | None = None,
    task: str | None = None,
    layout: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    allow_collapsed: bool = False,
    skip_bad: bool = False,
    allow_dropped: bool = False,
    quiet: bool = False,
    offload: bool = False,
    over_memory: bool = False,
    verify: bool = False,
    measure: Extent = "full",
    trust: Trust = "none",
    force: bool | None = None,
    stream: bool | None = None,
) -> Result:
    """Run a recipe on a model and write the result to `output`.

    Args:
        recipe: a shipped recipe's name, a YAML file, or the raw mapping of one.
        model: hub id, local folder of safetensors, GGUF file, or a live model, which stays as it is; a config.json of a
            model of pictures, whose weights are drawn by the seed, where the recipe's first stage trains them.
        data: registered name or local file(s); the recipe's own if None.
        output: folder of the new checkpoint; it must not exist or be empty, but with `overwrite`.
        keep: share that stays, in (0, 1]; of the block parameters, unless the recipe counts something else.
        parameters: in place of `keep`, all parameters wanted, such as "5.4B".
        macs: in place of `keep`, the dense model's multiply-accumulates a token over those of the smaller one, at least
            1: 1.5 keeps 1/1.5 of them. It measures no time.
        milliseconds: in place of `keep`, those that one forward may take, as `latency_table` tells them.
        speedup: in place of `keep`, the dense model's milliseconds over the smaller one's, such as "1.5x"; several,
            such as "1.2x,1.5x,2x", are met one after the other, and each gives a checkpoint `output/1.2x`.
        latency_table: the file that `compresso latency` wrote for this model on this machine.
        memory: of a model of pictures, the most that a process takes which reads one, libraries included, as
            `latency_table` tells it: "3.7GB"; alone, or with `milliseconds`.
        bytes_at_context: tokens of one sequence whose key/value cache is counted with the weights, in bytes; `keep` is
            then the share of both that stays.
        max_steps: cap on the updates of each training stage; schedules shrink with it.
        sets: overrides of knobs, such as "stages.learn_gates.mask_lr=0.02".
        target: an engine whose shape constraints hold the budgets: "llama.cpp:q4_k", "awq:g128", "vllm:tp2".
        task: what is trained and judged by, such as "classification"; the recipe's own if None.
        layout: "uniform", "padded", "native", or "auto": uniform where the shapes allow it, else native.
        tokenizer: of a live model; others bring theirs.
        seed: of every random draw.
        device: "auto", "cpu", "cuda", "cuda:1".
        resume: continue an interrupted run of the same arguments.
        overwrite: replace an output that a run wrote, and discard an interrupted run; a folder with anything else in it
            is refused.
        allow_collapsed: write a result that the collapse guard refuses.
        skip_bad: leave malformed data lines, and conversations that the chat template refuses, out (counted) instead
            of stopping.
        allow_dropped: go on where more than a fifth of a source's records give no example.
        quiet: show no progress.
        offload: read weights from disk block by block, for models larger than memory; one-shot recipes of one
            calibrated stage only.
        over_memory: offload even where the estimate is above what is there.
        measure: what is measured of both models at the end: "full"; "quick", without speed and divergence and with
            shorter texts; "none", the loss on held-out examples alone.
        trust: whether both models are asked, at the end, what tells of trust: "none"; "quick", a few questions of each
            dimension; "full", all. What needs published files finds them below COMPRESSO_DATA.
        verify: open the result in every engine that is there, each in a process of its own, and record what came of it.
        force: deprecated: `overwrite` and `allow_collapsed`.
        stream: deprecated: `offload`.

    Raises:
        CompressoError: bad input (exit 2), too little resource (3) or a numeric failure (4); what was at `output` is
            untouched.
        Interrupted: SIGINT or SIGTERM came while a stage trained; its state is saved for `resume`.

    Example:
        compresso.run("compresso", "meta-llama/Llama-2-7b-hf", "alpaca-gpt4", keep=0.7, output="llama-5b")
    """
    if force is not None:
        deprecated("force=", "overwrite=, allow_collapsed= or both")
        overwrite, allow_collapsed = overwrite or force, allow_collapsed or force
    if stream is not None:
        deprecated("stream=", "offload=")
        offload = offload or stream
    started = time.time()
    options: dict[str, Any] = {
        "keep": keep,
        "parameters": parameters,
        "macs": macs,
        "milliseconds": milliseconds,
        "speedup": speedup,
        "latency_table": latency_table,
        "memory": memory,
        "bytes_at_context": bytes_at_context,
        "max_steps": max_steps,
        "sets": sets,
        "target": target,
        "task": task,
        "data": None if data is None else str(data),
        "layout": layout,
    }
    with (
        named(model, tokenizer) as given,
        drawn(given, recipe, task, seed, quiet) as name,
        whole_weights(),
        progress_bars(shown=not quiet),
        said_as_asked(options, partial(check_shapes, recipe, name, layout)),
    ):
        raw = with_options(recipe, model=name, **options)
        prepared = prepare(
            raw,
            name,
            None if data is None else str(data),
            output=Path(output),
            layout=layout,
            seed=seed,
            device=device,
            overwrite=overwrite,
            skip_bad=skip_bad,
            allow_dropped=allow_dropped,
            offload=offload,
            quiet=quiet,
            resume=resume,
        )
        refuse_trust(trust, prepared.recipe.task, prepared.tokenizer is not None, offload)
        refuse_together([act.name for act in prepared.recipe.acts], processes())
        accelerator = new_accelerator(prepared.device)
        is_main = accelerator.is_main_process
        owned = WorkFolder.open(prepared.output, prepared.identity(), resume=resume, force=overwrite)
        with owned if is_main else nullcontext(WorkFolder(WorkFolder.beside(prepared.output))) as work:
            acts = prepared.recipe.acts
            accelerator.wait_for_everyone()
            if is_main and not quiet:  # nothing refuses the run any more
                for sentence in prepared.said:
                    log.warning(sentence)
                for sentence in rounds_told(acts):
                    log.info(sentence)
                for stage_name, sentence in prepared.lacking.items():
                    log.warning("%s: %s", stage_name, sentence)
            targets = targets_of(acts)
            done = work.finished([act.folder for act in acts])
            wanting = (i for i, act in enumerate(acts) if act.target and not work.has_target(act.target))
            done = done[: next(wanting, len(done)) + 1]
            new_head = not done and prepared.recipe.task.lacks_head(prepared.source.config)
            if is_main and not quiet and new_head:
                made_by, task_name = prepared.recipe.stages[0][0], prepared.recipe.task.name
                log.warning("%s has no head for %s: %s makes a new one", prepared.source.name, task_name, made_by)
            job = new_job(prepared, work.path, quiet)
            if offload and done:
                raise ResumeError(
                    "the interrupted run has finished its stage in memory; resume it without --offload, or start anew"
                    " with --overwrite"
                )
            if offload:
                job = offloaded_job(job, prepared, over_memory=over_memory)
            dense = dense_of(prepared, done)
            with job.progress().working("reading the weights"):
                job, before = with_weights(job, prepared, dense, done)
            score = None
            if not before and not card(prepared.recipe.stages[0][0]).makes_dense:
                score = scored(job, DENSE)
                before = state(job, score)
            after = None

            def write(job: Job, after: Score | None, at: Path, replaces: bool) -> dict[str, Any]:
                """Judge the model as it is and write it as a checkpoint; what its records say."""
                if prepared.prompt is not None and job.tokenizer is not None:
                    job = replace(job, tokenizer=copy.deepcopy(job.tokenizer)) if targets else job
                    apply_to_tokenizer_(cast(Any, job.tokenizer), prompt_on=True)
                facts = {
                    **prepared.origin(),
                    "before": before,
                    "after": state(job, after),
                    "stages": dict(job.records),
                    "patches": written(job.patches),
                    "dense": None if dense is prepared.source else asdict(dense.identity),
                }
                if not is_main:
                    return facts
                asked = TrustCheck(trust, work.path / "trust" / at.name if targets else work.path / "trust")
                evaluation = _evaluated(job, prepared, dense, facts, measure, {DENSE: score, PRUNED: after}, asked)
                _refuse_collapse(evaluation, prepared.recipe.name, allowed=allow_collapsed, quiet=quiet)
                facts["seconds"] = round(time.time() - started, 1)
                dtype = stored_dtype(prepared.source)
                ask, carried = partial(_asked, job) if verify else None, prepared.source.folder
                with job.progress().working("writing the checkpoint and opening it again"):
                    return finish(job, facts, evaluation, dense, prepared.layout, at, replaces, dtype, ask, carried)

            def gathered() -> dict[str, Any]:
                """All targets side by side in the output; what the records of the last say."""
                return (
                    gather({name: work.target(name) for name in targets}, prepared.output, overwrite) if is_main else {}
                )

            owed = acts[len(done) - 1].target if done else ""
            if owed and not work.has_target(owed):  # its stage had finished, and the guard refused it
                after = scored(job, PRUNED)
                write(job, after, work.target(owed), replaces=True)
            for index, act in enumerate(acts):
                if index < len(done):
                    continue
                begun = time.time()
                stage_name, received = act.label, job
                job, stage, told = entered(job, act)
                entering = replace(job, out=work.training(act.folder))
                job = left_round(applied(stage, entering, act), received, act, told)
                if not offload:  # a sweep looks at each weight it makes
                    check_finite(job.model, stage_name)
                job = job.note(stage_name, seconds=round(time.time() - begun, 2))
                if (sentence := prepared.lacking.get(stage_name)) is not None:
                    job = job.note(stage_name, lacking_kinds=sentence)
                makes_dense = card(act.name).makes_dense
                after = scored(job, DENSE if makes_dense else PRUNED)
                job = job.note(stage_name, left=left(job, after, prepared.corpus()))
                if is_main and not quiet and (emptied := filled_now(job.records, stage_name)):
                    log.warning(
                        "%s changed weights behind %s and filled its zeros: sparse_finetune trains and keeps them",
                        stage_name,
                        emptied,
                    )
                if makes_dense:
                    score = after
                    before = state(job, score)
                accelerator.wait_for_everyone()  # others may still read what the stage left in its folder
                if is_main and not offload:  # the journal of an offloaded sweep holds what is done
                    work.save_stage(index, act.folder, partial(save_stage, job, before, whole=makes_dense))
                if act.target:
                    write(job, after, work.target(act.target), replaces=True)
                accelerator.wait_for_everyone()
                if makes_dense:
                    dense = saved_dense(prepared, work.stage(index, act.folder))
                    job = replace(job, original=reader(dense))
            if after is None:  # no data, or a resumed run found all stages done
                after = scored(job, PRUNED)
            facts = broadcast(accelerator, gathered() if targets else write(job, after, prepared.output, overwrite))
            if is_main:
                work.discard()
            if offload:
                job = replace(job, model=opened_offloaded(Path(output), prepared))
    family = {name: Path(output) / name for name in targets}
    return Result(job.model, job.tokenizer, job.plan, facts, family[targets[-1]] if targets else Path(output), family)


def _asked(job: Job, folder: Path) -> Sequence[Mapping[str, Any]]:
    """What every engine makes of a written folder."""
    asking = worded("asking the engines of this machine (--no-verify leaves it out)", ("verify",))
    with job.progress().working(asking):
        return parity_records(folder)


def _evaluated(
    job: Job,
    prepared: Prepared,
    dense: Source,
    facts: Mapping[str, Any],
    extent: Extent,
    scores: Mapping[str, Score | None],
    trust: TrustCheck,
) -> FinalEvaluation:
    """Results of the dense model and the smaller one, and the verdict."""
    return take(
        job,
        dense,
        corpus=prepared.corpus(),
        instructions=prepared.records is not None and prepared.records.kind != "text",
        prompt_on=prepared.prompt is not None,
        before=facts["before"]["held_loss"],
        after=facts["after"]["held_loss"],
        extent=extent,
        scores=scores,
        trust=trust,
    )


def _refuse_collapse(evaluation: FinalEvaluation, tried: str, *, allowed: bool, quiet: bool) -> None:
    """Say what the guard found. Raises CollapseError if it refuses and that was not allowed, with what was tried and
    one text of each model; the finished stages stay for a resume.
    """
    guard = evaluation.guard
    if guard.verdict == "refuse" and not allowed:
        raise CollapseError(
            f"{guard.message()} Tried: {tried}.{evaluation.example()} The finished stages are kept: --resume"
            " --allow-collapsed writes this result without training again"
        )
    if guard.verdict in ("warn", "refuse") and not quiet:
        log.warning(guard.message())
