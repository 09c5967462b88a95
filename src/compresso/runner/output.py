"""What a run writes: saved stages, the final checkpoint and its records."""

import json
import math
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from compresso.arch.context import macs_of
from compresso.arch.outputs import any_input
from compresso.checkpoint.atomic import new_folder, write_text
from compresso.checkpoint.folder import read_json
from compresso.checkpoint.overwrite import FAMILY, RUN, refuse_foreign
from compresso.checkpoint.places import without_places_in
from compresso.checkpoint.source import Source, open_source
from compresso.core.counted import counted
from compresso.data.records import Records
from compresso.data.survival import Encoded
from compresso.edit.patches import patch_, unpatch_
from compresso.engines.registry import commands
from compresso.formats.config_text import readers
from compresso.formats.hf import Layout, reopen_and_compare, save_checkpoint
from compresso.formats.offloaded import save_offloaded
from compresso.formats.patched import save_patches
from compresso.job import Job
from compresso.metrics.record import Environment, installed
from compresso.metrics.size import counts, weight_bytes
from compresso.native import (
    MOE_FILE,
    PYRAMID_FILE,
    SEGFORMER_FILE,
    mixture_family_of,
    pyramid_auto_map,
    staged_family_of,
)
from compresso.report.card import model_card
from compresso.report.html import report_of_run
from compresso.report.records import FORMAT, RunRecords
from compresso.runner.evaluated import FinalEvaluation
from compresso.runner.kept_experts import kept_experts
from compresso.runner.recipe import Recipe
from compresso.tasks.base import Score

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
REOPENED_WITHIN = 1e-4
"""Largest difference of logits, computed in float32, between the live model and the checkpoint opened in a fresh
process.
"""


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    return {
        "compresso": installed("compresso-llm"),
        **{name: installed(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }


def origin(
    recipe: Recipe,
    source: Source,
    records: Records | None,
    encoded: Encoded | None,
    prompt: Mapping[str, str] | None,
    seed: int,
    said: Sequence[str] = (),
) -> dict[str, Any]:
    """What a result was made from, without paths of this machine; `recipe` names its data by file names."""
    return {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "model": asdict(source.identity),
        "data": None if records is None or encoded is None else _data(records, encoded, said),
        "prompt": prompt,
        "seed": seed,
        "versions": versions(),
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "cuda": _cuda(),
        },
    }


def state(job: Job, score: Score | None = None) -> dict[str, Any]:
    """Counts of the model as it is, and its mean loss on held-out examples (nats a labelled token; None without data).

    score: of those examples, as `scored` gives it.
    """
    return {**counts(job.cost()), **macs_of(job.model), "held_loss": None if score is None else round(score.mean, 6)}


def left(job: Job, score: Score | None, corpus: str) -> dict[str, Any]:
    """What a stage left, as `compresso.report.stage_facts.Left` reads it.

    Args:
        job: with the model as it is.
        score: of the held-out examples, as `scored` gives it.
        corpus: they are of, in a word.
    """
    now = state(job, score)
    here = Environment.here(job.model.device, job.model.dtype)
    found = () if score is None else score.measurements(here, corpus)
    metric = next((one.model_dump(mode="json") for one in found if one.name == job.task.metric), None)
    found = {key: now[key] for key in ("macs_per_token", "held_loss")}
    zeros = {"zeros": _zeros(job)} if any(facts.get("sparsity") for facts in job.records.values()) else {}
    return {"parameters": now["parameters"]["total"], **found, "score": metric, **zeros}


def _zeros(job: Job) -> float:
    """Share of zeros in the matrices of a model's blocks."""
    inside = {id(one) for block in job.arch.blocks(job.model) for one in block.parameters() if one.ndim > 1}
    names = [name for name, one in job.model.named_parameters() if id(one) in inside]
    tensors, zeros, entries = job.weights.tensors(), 0, 0
    for name in names:  # one after the other: they may lie on disk
        matrix = tensors[name]
        zeros, entries = zeros + int((matrix == 0).sum()), entries + matrix.numel()
    return zeros / max(entries, 1)


def scored(job: Job, whose: str) -> Score | None:
    """How the model as it is does on the held-out examples; None without data.

    whose: model it is, for a person who waits.

    Raises NumericError if its loss is not finite.
    """
    if not job.held:
        return None
    with (
        job.weights.whole(),
        job.progress().working(f"scoring {counted(len(job.held), 'held-out example')}, {whose} model"),
    ):
        return job.task.score(job.model, job.held, job.dense_held)


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype most of a checkpoint's numbers are stored in."""
    numbers = dict.fromkeys(_DTYPES, 0)
    for tensor in source.tensors.values():
        if tensor.dtype in numbers:
            numbers[tensor.dtype] += math.prod(tensor.shape)
    return _DTYPES[max(numbers, key=lambda dtype: numbers[dtype])]


def finish(
    job: Job,
    facts: Mapping[str, Any],
    evaluation: FinalEvaluation,
    source: Source,
    layout: Layout | Literal["auto"],
    output: Path,
    overwrite: bool,
    dtype: torch.dtype,
    ask: Callable[[Path], Sequence[Mapping[str, Any]]] | None = None,
    came_from: Path | None = None,
) -> dict[str, Any]:
    """Write the checkpoint beside `output`, reopen it in a fresh process, add its report, then rename it into place.

    Args:
        job: with the smaller model, live.
        facts, evaluation: of the run so far.
        source: of the dense model.
        layout, output, overwrite: as the run was asked.
        dtype: to store.
        ask: what every engine makes of the written folder, for the records; None asks none.
        came_from: the folder of the model that the run was given, whose other files are carried over.

    Returns:
        The records, with layout, bytes, the reopened difference, the guard and the report.

    Raises:
        ExportError: if the layout cannot hold the shapes, or what was written reads back differently; nothing is left
            at `output`.
    """
    model = job.model
    shapes = job.arch.shapes(model)
    ids = any_input(model.config)
    with new_folder(output, overwrite) as folder:
        unpatch_(model)  # the files hold no patch: what they compute is compared without it
        if job.offloaded:
            used, difference = save_offloaded(job.offloaded, source, folder, job.tokenizer, ids, REOPENED_WITHIN)
        else:
            used = save_checkpoint(
                model, shapes, folder, layout=layout, tokenizer=job.tokenizer, dtype=dtype, source=came_from
            )
            difference = reopen_and_compare(folder, model, ids, atol=REOPENED_WITHIN)
        patch_(model, job.patches)
        save_patches(job.patches, folder)
        written: dict[str, Any] = {
            **facts,
            "layout": used,
            **_modeling(model.config.model_type, used),
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": weight_bytes(folder),
            "reopened_max_abs_difference": difference,
            "guard": evaluation.guard.model_dump(mode="json"),
        }
        write_text(
            folder / "records.json", _json(written)
        )  # engines are asked what they make of it with what is known of it
        written["engines"] = list(ask(folder)) if ask else []
        result = replace(open_source(folder).identity, name=output.name)
        written["report"] = evaluation.report(source, result, folder, facts).model_dump(mode="json")
        written = without_places_in(written)
        records = RunRecords.checked(written, "the run's records")
        texts = {
            "recipe.yaml": yaml.safe_dump(_recipe(written), sort_keys=False, width=120),
            "plan.json": job.plan.to_json(),
            **kept_experts(job),
            "records.json": _json(written),
            "README.md": model_card(records, commands(), readers(read_json(folder / "config.json"))),
            "report.html": report_of_run(records, job.plan, commands()),
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        if job.adapters is not None and job.adapters.is_dir():
            shutil.copytree(job.adapters, folder / "adapters")
        if overwrite:
            refuse_foreign(output, RUN)  # somebody may have put a file there while the run went on
    return written


def _modeling(model_type: str, layout: Layout) -> dict[str, str]:
    """The file of ours that holds a written model's class, for its records, where the layout alone does not say it."""
    if pyramid_auto_map(model_type):
        return {"modeling": PYRAMID_FILE.name}
    if layout == "native" and staged_family_of(model_type):
        return {"modeling": SEGFORMER_FILE.name}
    return {"modeling": MOE_FILE.name} if layout == "native" and mixture_family_of(model_type) else {}


def gather(made: Mapping[str, Path], output: Path, overwrite: bool) -> dict[str, Any]:
    """Put several finished results side by side into `output`, each under its name.

    Args:
        made: name -> folder of each, the last one last.
        output, overwrite: as the run was asked.

    Returns:
        The records of the last.
    """
    with new_folder(output, overwrite) as folder:
        for name, one in made.items():
            shutil.copytree(one, folder / name)
        if overwrite:
            refuse_foreign(output, FAMILY)
    return read_json(output / [*made][-1] / "records.json")


def _recipe(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as it was run, and under `run` what else decided the result; it can be run again as it is."""
    data = facts["data"]
    known = {name: facts[name] for name in ("model", "prompt", "seed", "versions", "layout")}
    return {**facts["recipe"], "run": {**known, "data": data and {name: data[name] for name in ("source", "sha256")}}}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _data(records: Records, encoded: Encoded, said: Sequence[str]) -> dict[str, Any]:
    """Where the training data came from, its identity, and what became of it."""
    return {
        "source": records.source,
        "kind": records.kind,
        "sha256": records.sha256,
        "skipped_lines": records.n_bad,
        "skipped": [*records.bad, *encoded.bad],
        "examples": asdict(encoded.stats),
        "columns": dict(records.columns),
        "passed_over": dict(records.passed_over),
        "notes": list(said),
    }


def _cuda() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
