"""The job from a model and a recipe to a checkpoint that loads, with its records.

Everything that can be wrong is checked first (`preflight`); weights are read last. Each finished stage is saved in a
work folder beside the output; the result is renamed into place at the end, after a fresh process has reopened it
(`execution`).
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.workfolder import WorkFolder
from compresso.core.plan import Plan
from compresso.door import public
from compresso.errors import deprecated
from compresso.metrics.trust.asking import check_asks
from compresso.runner.asked_budget import said_as_asked
from compresso.runner.clock import Clock
from compresso.runner.drawn import drawn
from compresso.runner.execution import Execution, Wishes
from compresso.runner.final_evaluation import Extent
from compresso.runner.first_job import named, progress_bars
from compresso.runner.options import with_options
from compresso.runner.preflight import check_shapes, prepare
from compresso.runner.trust_check import Trust, refuse_trust, trust_questions
from compresso.stage import refuse_together
from compresso.training.launch import new_accelerator, processes, whole_weights


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
        questions = trust_questions(trust, seed)
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
        if questions is not None and prepared.tokenizer is not None:
            check_asks(prepared.tokenizer, prepared.source.name)
        refuse_together([act.name for act in prepared.recipe.acts], processes())
        accelerator = new_accelerator(prepared.device)
        main = accelerator.is_main_process
        owned = WorkFolder.open(prepared.output, prepared.identity(), resume=resume, force=overwrite)
        mine = owned if main else nullcontext(WorkFolder(WorkFolder.beside(prepared.output)))
        wishes = Wishes(measure, questions, verify, overwrite, allow_collapsed, offload, over_memory, quiet)
        with mine as work, Clock(work.path if main else None, started, resumed=resume) as clock:
            execution = Execution(prepared, wishes, accelerator, work, clock)
            facts = execution()
    job, targets = execution.job, execution.targets
    family = {name: Path(output) / name for name in targets}
    return Result(job.model, job.tokenizer, job.plan, facts, family[targets[-1]] if targets else Path(output), family)
