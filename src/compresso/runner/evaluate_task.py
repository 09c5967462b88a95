"""The metric of a task on a file of examples, such as the accuracy of a classifier."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from compresso.arch.context import positions_of
from compresso.checkpoint.load import load_model
from compresso.checkpoint.patched import columns_read, stored_patches
from compresso.checkpoint.pixels import pixel_input
from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.checkpoint.writes_text import refuse_textless
from compresso.data.records import Records
from compresso.data.registry import load_records
from compresso.edit.patches import patch_
from compresso.edit.stock import as_stock
from compresso.errors import ArchError, DataError
from compresso.metrics.record import Environment, Measurement, Setting
from compresso.report.cures import TRAINED_FOR
from compresso.runner.examples import notes_of, vocabulary
from compresso.tasks.base import Reading, task_named, tasks

log = logging.getLogger(__name__)

SKIPPED = "bad_lines_skipped"
"""The setting that counts lines of a file that were left out."""
MAX_LENGTH = 512
"""Tokens that are read of an example, where the model's context holds as many."""


def task_metric(
    source: Source, task: str, data: str | Path, device: torch.device, limit: int | None = None, skip_bad: bool = False
) -> tuple[Measurement, ...]:
    """The task's metric of a model, as `compresso.load` opens it, on all examples, or on `limit` evenly spaced ones,
    named after the file. skip_bad: leave bad lines out, which a warning and the settings then count.

    Raises:
        RecipeError: an unknown task.
        ArchError: a model that cannot do it, or that has no head for it.
        DataError: data that is not of its kind.
    """
    known = task_named(task)
    if obstacle := known.obstacle(source.config):
        raise ArchError(f"{source.name} {obstacle}")
    if known.lacks_head(source.config):
        raise ArchError(
            f"{source.name} has no head for {task}, so it says nothing that could be scored; give a model that a run"
            f" with --task {task} wrote"
        )
    tokenizer = load_tokenizer(source) if known.reads_text else None
    pixels = None if known.reads_text else pixel_input(source)
    context = positions_of(source.config)
    length = min(MAX_LENGTH, context or MAX_LENGTH)
    records = load_records(data, skip_bad=skip_bad, form=known.form)
    reading = Reading(length, limit=limit, skip_bad=skip_bad, context=context, pixels=pixels, learns=False)
    encoded = known.encode(records, tokenizer, reading, source.config)
    notes = notes_of(records, encoded, length, tokenizer, vocabulary(source.config), "--limit")
    for sentence in (*notes, *_other_columns(source, records)):
        log.warning("%s", sentence)
    model = as_stock(load_model(source, device=device)).eval()
    patch_(model, stored_patches(source))
    found = known.score(model, encoded.rows).measurements(Environment.here(device, model.dtype), records.source)
    name = records.source.partition(".")[0]
    how: dict[str, Setting] = {TRAINED_FOR: known.name}
    if records.n_bad:
        how[SKIPPED] = records.n_bad
    if known.reads_text:
        how |= {"max_length": length, "cut_examples": encoded.stats.cut}
    return tuple(
        one.model_copy(update={"name": one.name.replace("held", name, 1), "protocol": {**one.protocol, **how}})
        for one in found
    )


def _other_columns(source: Source, records: Records) -> list[str]:
    """That examples are made of other columns than those that the model learned from, where its records name them and
    it is so; a sentence, or nothing.
    """
    learned, given = columns_read(source), tuple(records.columns)
    if not learned or not given or set(learned) == set(given):
        return []
    return [
        f"{records.source}: the columns read are {', '.join(given)}, and {source.name} was made with"
        f" {', '.join(learned)}: it is scored on other columns than it learned from"
    ]


def check_words(task: str | None, data: str | None, tasks: Sequence[str] | None, *others: object) -> None:
    """Raise DataError unless task and data come together, and without what asks for something else."""
    if (task is None) != (data is None):
        both = (
            "--task and --data belong together: --task classification --data rows.jsonl, or of pictures --task"
            " segmentation --data rows.parquet"
        )
        if task is None and tasks:
            both += (
                f". --tasks '{','.join(tasks)}' is something else: benchmarks, which bring their own rows; leave out"
                " --data, or give --task in place of --tasks"
            )
        raise DataError(both)
    if task is not None and any(other is not None for other in (tasks, *others)):
        raise DataError(
            "--suite, --tasks, --corpus and --protocol are for models that write text; leave them out with a task"
        )


def refuse_other_than_text(source: Source) -> None:
    """Raise ArchError for a model whose perplexity and answers nobody could measure, with what can be."""
    config = source.config
    able = [name for name, task in tasks().items() if not task.obstacle(config) and not task.lacks_head(config)]
    if able:
        rows = "rows.jsonl" if task_named(able[0]).reads_text else "rows.parquet"
        refuse_textless(source, f"give --task {able[0]} --data {rows} to score what it was trained for")
    refuse_textless(
        source,
        "perplexity and tasks are measured of causal language models. An encoder of texts is scored by --task"
        " classification --data rows.jsonl once a run with that task has given it a head",
    )
