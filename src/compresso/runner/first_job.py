"""The job that a run begins with: its model by name, its rows, and the weights of the original or of the last finished
stage.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model, meta_model
from compresso.checkpoint.scratch import scratch_folder
from compresso.checkpoint.source import Source, open_source
from compresso.core.plan import Plan
from compresso.data.batches import pad_id
from compresso.edit.patches import patch_, read_patches
from compresso.edit.stock import as_stock
from compresso.errors import CheckpointError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.runner.examples import vocabulary
from compresso.runner.offload import computed_in
from compresso.runner.preflight import Prepared
from compresso.runner.saved_stages import load_stage
from compresso.stage import card


@contextmanager
def named(model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """What to open a model by; a live one is written to a temporary folder, so that it is checked and hashed as any
    other.
    """
    if isinstance(model, PreTrainedModel):
        with scratch_folder() as scratch:
            folder = scratch / type(model).__name__  # so that it has a name in the records
            model = as_stock(model)
            save_checkpoint(model, arch_for(model.config).shapes(model), folder, tokenizer=tokenizer)
            yield str(folder)
        return
    if tokenizer is not None:
        raise CheckpointError(f"tokenizer= goes with a live model; {model} brings its own, so leave it out")
    yield str(model)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Silence the bars of transformers while a quiet run reads and writes."""
    were_on = transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers_logging.enable_progress_bar()


def new_job(prepared: Prepared, out: Path, quiet: bool) -> Job:
    """The job before its weights are read; `out` is where stages keep what they need for a resume."""
    rows = prepared.encoded.rows if prepared.encoded else []
    held = prepared.recipe.task.held_places(rows, prepared.recipe.data.held)
    model = meta_model(prepared.source)
    return Job(
        model=model,
        arch=arch_for(model.config),
        tokenizer=prepared.tokenizer,
        rows=[row for i, row in enumerate(rows) if i not in held],
        held=[row for i, row in enumerate(rows) if i in held],
        plan=Plan(),
        records={},
        identity=prepared.identity(),
        seed=prepared.seed,
        out=out,
        adapters=out / "adapters",
        pad_id=0 if prepared.tokenizer is None else pad_id(prepared.tokenizer, vocabulary(prepared.source.config)),
        quiet=quiet,
        original=reader(prepared.source),
        task=prepared.recipe.task,
        labels=prepared.encoded.labels if prepared.encoded else (),
        allow_dropped=prepared.allow_dropped,
        measures=prepared.recipe.measures,
    )


def reader(source: Source) -> Callable[[torch.dtype, torch.device], PreTrainedModel]:
    """What reads a model once more."""
    return lambda dtype, device: as_stock(load_model(source, dtype=dtype, device=device))


def saved_dense(prepared: Prepared, folder: Path) -> Source:
    """The dense model that a stage left."""
    return replace(open_source(folder), name=f"{prepared.source.name}, fine-tuned")


def dense_of(prepared: Prepared, done: Sequence[Path]) -> Source:
    """The model that others are compared with: what the run started from, or what a finished stage made of it."""
    makers = [folder for folder, act in zip(done, prepared.recipe.acts, strict=False) if card(act.name).makes_dense]
    return saved_dense(prepared, makers[-1]) if makers else prepared.source


def with_weights(job: Job, prepared: Prepared, dense: Source, done: Sequence[Path]) -> tuple[Job, dict[str, Any]]:
    """The job with the original's weights or those of the last finished stage, and what the dense model measured then;
    nothing, where that is to be done.
    """
    dtype = computed_in(prepared)
    if job.offloaded:
        return job, {}
    if not done:
        return replace(job, model=as_stock(load_model(prepared.source, dtype=dtype, device=prepared.device))), {}
    job = replace(job, original=reader(dense))
    model, plan, facts = load_stage(done[-1], dense, dtype, prepared.device)
    patches = read_patches(facts.get("patches", ()), done[-1])  # a stage saved before there were any names none
    patch_(model, patches)
    if "vocab" in plan.kept:
        job, _ = job.with_tokens(plan.kept["vocab"])
    return replace(job, model=model, plan=plan, records=facts["stages"], patches=patches), facts["before"]
