"""Structured pruning, compared fairly: one size, the same data, the same number of training updates for every method.

    python benchmarks/structured.py [--models nano babyllama-tok361] [--keep 0.8 0.7 0.5] [--seeds 0 1 2] [--updates
        200] [--methods "gate-Taylor" Compresso] [--workers 2] [--device cuda] [--time-limit 600]
    python benchmarks/structured_report.py        # the tables and the page, from what is there

A job is one model, share, seed and method: prune, measure, train, measure. Jobs run in `--workers` processes of one
thread each and add a line to results/structured.jsonl as they finish; those found there are not repeated. All methods
of a seed come before the next seed, so that a run that was stopped compares like with like. A method whose recipe is
not there is named and left out.

Quality of the nano model: mean accuracy on nine tasks of fresh items, and perplexity of fresh documents. Of
babyllama-tok361: loss in nats a token on windows held out from training, and on the first window of five stories of
another split. Seconds are wall seconds with all workers busy; peak memory is the GPU's, of the job alone.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, machine
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.row import Row
from compresso.data import world
from compresso.edit.stock import as_stock
from compresso.errors import RecipeError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.metrics.choices import choice_accuracy
from compresso.metrics.held import held_loss
from compresso.metrics.perplexity import every_token, perplexity
from compresso.runner.first_job import new_job
from compresso.runner.preflight import Prepared, prepare
from compresso.runner.recipe import build
from compresso.training.device import choose_device
from structured_cases import DENSE, KEEPS, METHODS, STORIES, UNSEEN, Case, cases, recipe_of

LOG = RESULTS / "structured.jsonl"
FRESH = 31_415_926
WHOLE = ("layers", "attention", "mlp")
"""Axes of which a row says what stayed; of all others, how many units."""
DOCUMENTS = 400


@cache
def prepared(case_name: str, device: str) -> Prepared:
    """A model's data, read and tokenised once a process."""
    case = cases()[case_name]
    raw = recipe_of(case, METHODS["gate-Taylor"], 0.5, 2)
    output = Path(tempfile.gettempdir(), f"compresso-structured-{os.getpid()}")
    return prepare(
        raw,
        str(case.model),
        case.data,
        output=output,
        layout="auto",
        seed=0,
        device=device,
        overwrite=True,
        skip_bad=False,
    )


def quality(case: Case, job: Job, items: int) -> dict[str, Any]:
    """What a model is worth: numbers by name."""
    found: dict[str, Any] = {"held_loss": round(held_loss(job.model, job.held, 32).mean, 5)}
    assert job.tokenizer is not None
    if case.name == "nano":
        chosen = [item for task in world.TASKS for item in world.items(task, items, FRESH)]
        result = choice_accuracy(job.model, job.tokenizer, chosen, batch_size=256)
        documents = world.documents(DOCUMENTS, FRESH)
        found |= {
            "accuracy": round(result.accuracy, 5),
            "stderr": round(result.stderr, 5),
            "items": result.n,
            "perplexity": round(
                perplexity(
                    job.model, job.tokenizer, documents, every_token("world", "fresh", 256), batch_size=64
                ).value,
                4,
            ),
        }
    else:
        found["unseen_loss"] = round(held_loss(job.model, unseen(case, job)).mean, 5)
    return found


def unseen(case: Case, job: Job) -> list[Row]:
    """The first window of each story of the other split."""
    path = Path(case.data.removesuffix(STORIES), UNSEEN)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    assert job.tokenizer is not None
    length = job.model.config.max_position_embeddings
    ids = [job.tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]
    return [{"input_ids": one, "labels": one} for one in ids]


def one_job(task: tuple[str, float, int, str, int, int, str]) -> dict[str, Any]:
    """Prune, measure, train, measure; an error is a result too."""
    case_name, keep, seed, name, updates, items, device = task
    torch.set_num_threads(1)
    row: dict[str, Any] = {"model": case_name, "keep": keep, "seed": seed, "method": name, "updates": updates}
    started = time.perf_counter()
    try:
        row |= _measured(cases()[case_name], keep, seed, name, updates, items, device)
    except Exception as error:  # one method that fails must not end the comparison
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _measured(case: Case, keep: float, seed: int, name: str, updates: int, items: int, device: str) -> dict[str, Any]:
    """The numbers of one job."""
    base = replace(prepared(case.name, device), seed=seed)
    on_gpu = base.device.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        job = new_job(base, Path(scratch), quiet=True)
        job = replace(job, model=as_stock(load_model(base.source, dtype=torch.float32, device=base.device)))
        dense = job.cost()().parameters()
        if name == DENSE:
            return {"after": quality(case, job, items), "parameters": dense["total"], "kept_blocks": 1.0}
        recipe = build(recipe_of(case, METHODS[name], keep, updates), name)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        facts: dict[str, Any] = {"stage_seconds": []}
        for index, (stage_name, stage) in enumerate(recipe.stages):
            begun = time.perf_counter()
            job = stage(replace(job, out=Path(scratch, stage_name)))
            facts["stage_seconds"].append(round(time.perf_counter() - begun, 1))
            if index == 0:
                facts["before"] = quality(case, job, max(1, items // 3))
        facts["after"] = quality(case, job, items)
        counted = job.cost()().parameters()
        facts |= {"parameters": counted["total"], "kept_blocks": round(counted["blocks"] / dense["blocks"], 5)}
        if on_gpu:
            facts["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        if seed == 0:
            facts["kept"] = {
                axis: list(units) if axis in WHOLE else len(units) for axis, units in job.plan.kept.items()
            }
            model = job.model.cpu()
            folder = Path(scratch, "checkpoint")
            facts["layout"] = save_checkpoint(model, job.arch.shapes(model), folder, tokenizer=job.tokenizer)
            ids = torch.arange(32).unsqueeze(0)
            with torch.no_grad():
                again = load_model(open_source(folder), dtype=torch.float32, device=torch.device("cpu"))(
                    input_ids=ids
                ).logits
                facts["reopened_difference"] = float((again - model(input_ids=ids).logits).abs().max())
        return facts


def known(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a job the same as another."""
    return (row["model"], row["keep"], row["seed"], row["method"], row["updates"])


def rows_of(log: Path = LOG) -> list[dict[str, Any]]:
    """Finished jobs, the last of each; failed ones are tried again."""
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    return list({known(row): row for row in rows if "error" not in row}.values())


def tasks(given: argparse.Namespace) -> list[tuple[str, float, int, str, int, int, str]]:
    """The jobs that are still to do, seed by seed."""
    done = {known(row) for row in rows_of()}
    found = cases()
    chosen: list[tuple[str, float, int, str, int, int, str]] = []
    for seed in given.seeds:
        for keep in given.keep:
            for name in (DENSE, *(given.methods or METHODS)):
                for model in given.models or found:
                    share, at = (1.0, 0) if name == DENSE else (keep, seed)
                    if (model, share, at, name, given.updates) in done or (
                        name == DENSE and (seed, keep) != (given.seeds[0], given.keep[0])
                    ):
                        continue
                    if name != DENSE and not _exists(model, name):
                        continue
                    chosen.append((model, share, at, name, given.updates, given.items, given.device))
    return chosen


@cache
def _exists(model: str, name: str) -> bool:
    try:
        build(recipe_of(cases()[model], METHODS[name], 0.5, 10), name)
    except RecipeError as error:
        print(f"{name} is left out on {model}: {error}")
        return False
    return True


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=None, choices=list(METHODS))
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--items", type=int, default=300, help="fresh items a task; a third of them before recovery")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no job is started")
    given = parser.parse_args()
    choose_device(given.device)
    started = time.monotonic()
    facts = {"machine": machine() | {"workers": given.workers, "device": given.device}}
    waiting = iter(tasks(given))
    RESULTS.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(given.workers) as pool, LOG.open("a", encoding="utf-8") as log:
        running = [pool.apply_async(one_job, (task,)) for _, task in zip(range(given.workers), waiting, strict=False)]
        while running:
            for job in [job for job in running if job.ready()]:
                running.remove(job)
                row = job.get()
                log.write(json.dumps(row | facts) + "\n")
                log.flush()
                label = " ".join(str(row[key]) for key in ("model", "method", "keep", "seed"))
                print(f"{label}: {row.get('error') or row['after']} {row['seconds']} s", flush=True)
                in_time = time.monotonic() - started < given.time_limit
                if in_time and (task := next(waiting, None)):
                    running.append(pool.apply_async(one_job, (task,)))
            time.sleep(0.05)


if __name__ == "__main__":
    main()
