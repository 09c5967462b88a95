"""The job from a model and a recipe to a checkpoint that loads, with its records.

Everything that can be wrong is checked first: recipe, output, model headers, budget, data. Weights are read last. Each finished stage is saved
in a work folder beside the output; the result is renamed into place at the end, after a fresh process has reopened it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import arch_for
from compresso.checkpoint.atomic import check_output
from compresso.checkpoint.source import Source, has_tokenizer, load_model, load_tokenizer, meta_model, open_source
from compresso.checkpoint.workfolder import WorkFolder
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.data.batches import pad_id
from compresso.data.instructions import Encoded, encode
from compresso.data.prompt import prompt_identity
from compresso.data.records import Records
from compresso.data.registry import load_records
from compresso.data.template import apply_to_tokenizer_
from compresso.drive.device import choose_device
from compresso.dryrun import rehearse
from compresso.errors import DataError, RecipeError
from compresso.job import Job, check_finite
from compresso.native.stock import as_stock
from compresso.recipe import Recipe, build, read
from compresso.results import finish, origin, save_stage, state, stored_dtype, versions


@dataclass(frozen=True)
class Result:
    """What a run hands back.

    Args:
        model: the smaller model, live.
        tokenizer: with the prompt in its chat template if the model was pruned with one; None for a model without tokenizer.
        plan: everything removed, in terms of the original model.
        records: what records.json holds.
        folder: the checkpoint.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    plan: Plan
    records: Mapping[str, Any]
    folder: Path


def run(
    recipe: str | Path | Mapping[str, Any],
    model: str | Path,
    data: str | None = None,
    *,
    output: str | Path,
    layout: str = "auto",
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    skip_bad: bool = False,
    quiet: bool = False,
) -> Result:
    """Run a recipe on a model and write the result to `output`.

    Args:
        recipe: a shipped recipe's name, a YAML file, or the raw mapping of one.
        model: hub id or local folder of safetensors.
        data: registered name or local file(s); the recipe's own if None.
        layout: "uniform", "padded", "native", or "auto": uniform where the shapes allow it, else native.
        seed: of every random draw.
        device: "auto", "cpu", "cuda", "cuda:1".
        resume: continue an interrupted run of the same arguments.
        force: replace an existing output.
        skip_bad: leave malformed data lines out (counted) instead of stopping.
        quiet: show no progress.

    Raises:
        CompressoError: bad input (exit 2), too little resource (3) or a numeric failure (4); nothing is left at `output`.

    Example:
        compresso.run("compresso", "meta-llama/Llama-2-7b-hf", "alpaca-gpt4", output="llama-5b")
    """
    started = time.time()
    output = Path(output)
    if isinstance(recipe, Mapping):
        checked = build(recipe, str(recipe.get("name", "recipe")))
    else:
        checked = build(read(recipe), str(recipe))
    source = open_source(str(model))
    if not source.tensors:
        raise RecipeError(f"{model} has no weights; a run needs a folder of safetensors (a config.json is enough for `compresso plan`)")
    check_output(output, source.folder, force or resume)
    check_budgets(checked, source)
    where = choose_device(device)
    tokenizer = load_tokenizer(source) if checked.needs("data") or has_tokenizer(source) else None
    records, encoded = _examples(checked, data, tokenizer, source.config.vocab_size, skip_bad)
    prompt = prompt_identity() if checked.data.prompt and checked.needs("data") else None
    identity = {
        "recipe": checked.to_dict(),
        "model": asdict(source.identity),
        "data": records.sha256 if records else None,
        "prompt": prompt,
        "layout": layout,
        "seed": seed,
        "versions": versions(),
    }
    held = checked.data.held if records else 0
    is_main = PartialState().is_main_process
    with WorkFolder.open(output, identity, resume=resume, force=force) as work:
        done = work.finished()
        job = Job(
            model=meta_model(source),
            arch=arch_for(meta_model(source).config),
            tokenizer=tokenizer,
            rows=encoded.rows[held:] if encoded else [],
            held=encoded.rows[:held] if encoded else [],
            plan=Plan(),
            records={},
            identity=identity,
            seed=seed,
            out=work.path,
            pad_id=pad_id(tokenizer) if tokenizer is not None else 0,
            quiet=quiet,
        )
        job, before = _with_weights(job, source, done, where)
        for index, (name, stage) in enumerate(checked.stages):
            if index < len(done):
                continue
            begun = time.time()
            job = stage(replace(job, out=work.training(name)))
            check_finite(job.model, name)
            job = job.note(name, seconds=round(time.time() - begun, 2))
            if is_main:
                work.save_stage(index, name, partial(save_stage, job, before))
            PartialState().wait_for_everyone()
        if prompt is not None and tokenizer is not None:
            apply_to_tokenizer_(tokenizer, prompt_on=True)
        facts: dict[str, Any] = {
            **origin(checked, source, records, encoded, prompt, seed),
            "before": before,
            "after": state(job),
            "stages": dict(job.records),
            "seconds": round(time.time() - started, 1),
        }
        if is_main:
            facts = finish(job, facts, layout, output, force, stored_dtype(source))
            work.discard()
        PartialState().wait_for_everyone()
    return Result(job.model, tokenizer, job.plan, facts, output)


def check_budgets(recipe: Recipe, source: Source) -> None:
    """Try every stage's budget on the model's shapes, before weights are read. Raises BudgetError if one cannot be met."""
    model = meta_model(source)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    for name, stage in recipe.stages:
        budget = getattr(stage, "budget", None)
        if budget is not None:
            rehearse(name, axes, cost, budget())


def _examples(
    recipe: Recipe, data: str | None, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, skip_bad: bool
) -> tuple[Records | None, Encoded | None]:
    """Read and tokenise the training data, if the recipe needs any."""
    if not recipe.needs("data"):
        if data is not None:
            raise RecipeError(f"recipe {recipe.name} uses no data, but --data {data} was given; leave it out")
        return None, None
    chosen = data or recipe.data.source
    if chosen is None:
        raise DataError(f"recipe {recipe.name} needs data; give --data with a registered name or a local file, such as --data alpaca-gpt4")
    assert tokenizer is not None
    records = load_records(chosen, skip_bad=skip_bad)
    knobs = recipe.data
    encoded = encode(records, tokenizer, max_length=knobs.max_length, prompt_on=knobs.prompt, pack=knobs.pack, limit=knobs.limit, vocab_size=vocab_size)
    if len(encoded.rows) <= knobs.held:
        raise DataError(f"{chosen} gives {len(encoded.rows)} examples, of which {knobs.held} are held out; give more, or lower data.held")
    return records, encoded


def _with_weights(job: Job, source: Source, done: Sequence[Path], where: torch.device) -> tuple[Job, dict[str, Any]]:
    """The job with the original's weights or those of the last finished stage, and what the original measured."""
    # parameters that train on a CPU do so in float32: bfloat16 weights would round small merged updates away
    dtype = torch.float32 if where.type == "cpu" else stored_dtype(source)
    if not done:
        job = replace(job, model=as_stock(load_model(source, dtype=dtype, device=where)))
        return job, state(job)
    model = as_stock(load_model(open_source(str(done[-1])), dtype=dtype, device=where))
    facts = json.loads((done[-1] / "records.json").read_text("utf-8"))
    plan = Plan.from_json((done[-1] / "plan.json").read_text("utf-8"))
    return replace(job, model=model, arch=arch_for(model.config), plan=plan, records=facts["stages"]), facts["before"]
