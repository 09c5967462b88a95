"""What SquareHead is worth: 70 % of the weights zero by SparseGPT, then equal updates under four losses.

    python benchmarks/sparse_finetune.py --scratch FOLDER [--models babyllama SMOLLM2_FOLDER] [--only GLOB ...]
    python benchmarks/sparse_finetune_report.py

A seed draws what is calibrated on and the order of training, and all losses of a seed start from the same pruned model
and see the same batches. Each loss gets its rate from the same grid, by the loss on windows that no stage reads, with a
seed that is not scored. Then every seed is trained with that rate and scored on texts that were neither calibrated nor
trained on. In every cell the places of zeros before and after are compared, and their bits: they must be the same.

babyllama-tok361 reads the TinyStories sample but for its last 100 stories, which are scored, beside five of another
split; its authors trained it on the set that the sample is from. Any other model reads the RedPajama sample and is
scored on WikiText-2 and the C4 sample. A cell is a line of results/sparse_finetune.jsonl and is not done again.
`sparse_finetune_report.py` makes the table of them.
"""

import argparse
import copy
import gzip
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, high_water_mib, machine
from compresso.checkpoint.load import load_model
from compresso.edit.stock import as_stock
from compresso.edit.zeros import Zeros
from compresso.errors import NumericError
from compresso.job import Job
from compresso.metrics.corpora import corpus
from compresso.metrics.held import held_loss
from compresso.metrics.perplexity import perplexity
from compresso.metrics.protocol import PerplexityProtocol
from compresso.runner.first_job import new_job
from compresso.runner.preflight import Prepared, prepare
from compresso.sweep.targets import Where, chosen, names_of
from kept import keep, stored
from real_model import SCORED, TEXT
from sparse_cases import GRID_SEED, LOSSES, SCORED_STORIES, Case, babyllama, larger
from structured_cases import STORIES, UNSEEN

LINES = RESULTS / "sparse_finetune.jsonl"


@cache
def prepared(case: Case, scratch: Path) -> Prepared:
    """The case's data, tokenised once."""
    root = Path(os.environ["COMPRESSO_DATA"])
    data = str(root / TEXT)
    if case.windows is None:
        data = str(scratch / "stories.jsonl.gz")
        with gzip.open(root / STORIES, "rt", encoding="utf-8") as lines, gzip.open(data, "wt", encoding="utf-8") as out:
            out.writelines(list(lines)[:-SCORED_STORIES])
    out = Path(tempfile.gettempdir(), f"compresso-sparse-{os.getpid()}")
    return prepare(
        case.raw, str(case.model), data, output=out, layout="auto", seed=0, device="cpu", overwrite=True, skip_bad=False
    )


def begun(case: Case, seed: int, scratch: Path) -> Job:
    """The dense model with a seed's data."""
    base = replace(prepared(case, scratch), seed=seed)
    job = new_job(base, scratch, quiet=True)
    return replace(job, model=as_stock(load_model(base.source, dtype=torch.float32, device=torch.device("cpu"))))


def pruned(case: Case, seed: int, scratch: Path) -> Job:
    """The model that all losses of a seed start from; its weights are kept in `scratch`."""
    job, kept = begun(case, seed, scratch), scratch / f"{case.name}-{seed}.pt"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as out:
            job = case.stage("sparsegpt")(replace(job, out=Path(out)))
        torch.save(job.model.state_dict(), kept)
    job.model.load_state_dict(torch.load(kept, weights_only=True))
    return job


def scored(case: Case, job: Job) -> dict[str, Any]:
    """Perplexity of texts that nobody was trained on."""
    root = Path(os.environ["COMPRESSO_DATA"])
    found: dict[str, Any] = {}
    for name, place in ({"stories": STORIES, "other split": UNSEEN} if case.windows is None else SCORED).items():
        texts = corpus(place if name == place else root / place, data_root=root)
        how = PerplexityProtocol(name, texts.split, "blank line", 512, bos="none", max_windows=case.windows)
        taken = texts.texts
        if case.windows is None:
            how = PerplexityProtocol(name, texts.split, "separate", 256, bos="start", remainder="kept")
            taken = taken[-SCORED_STORIES:]
        assert job.tokenizer is not None
        result = perplexity(job.model, job.tokenizer, taken, how, batch_size=16 if case.windows is None else 2)
        found[name] = {"value": result.value, "loss": result.loss, "stderr": result.stderr, "tokens": result.n_tokens}
    return found


def zeros_of(job: Job) -> Zeros:
    """Where the linears of the blocks are 0."""
    return Zeros.of(job.model, names_of(chosen(job.model, job.arch, Where())))


def same_zeros(before: Zeros, job: Job) -> int:
    """How many weights are 0: as before, each at its place, and +0 by its bits. AssertionError if not."""
    after = zeros_of(job)
    assert before.counted == after.counted, "a zero came or went"
    for name, mask in before.masks.items():
        assert torch.equal(mask, after.masks[name]), f"{name}: a zero moved"
        bits = job.model.get_parameter(name).detach().float().view(torch.int32)[mask]
        assert not bits.any(), f"{name}: a zero is none by its bits"
    return sum(before.counted.values())


def trained(case: Case, start: Job, loss: str, rate: float, score: bool) -> dict[str, Any]:
    """One cell."""
    before, since = zeros_of(start), time.perf_counter()
    first = held_loss(start.model, start.held, 16 if case.windows is None else 2).mean
    found: dict[str, Any] = {"held_before": first}
    with tempfile.TemporaryDirectory() as out:
        job = replace(start, model=copy.deepcopy(start.model), out=Path(out))
        try:
            job = case.stage("sparse_finetune", lr=rate, **LOSSES[loss])(job)
            found["zeros"] = same_zeros(before, job)
            found["held"] = held_loss(job.model, job.held, 16 if case.windows is None else 2).mean
            curve = job.records["sparse_finetune"]["curve"]
            found["curve"] = {name: [values[0], values[-1]] for name, values in curve.items() if name != "update"}
            if score:
                found["found"] = scored(case, job)
        except NumericError as error:
            found["diverged"] = str(error)
    return found | {"seconds": round(time.perf_counter() - since, 1)}


def best(done: list[dict[str, Any]], model: str, loss: str) -> float:
    """The rate with the lowest loss on windows held out, among the cells that are for this."""
    grid = [row for row in done if (row["model"], row["loss"], row["seed"]) == (model, loss, GRID_SEED)]
    return min((row for row in grid if "diverged" not in row), key=lambda row: row["held"])["rate"]


def cells(case: Case) -> Iterator[tuple[int, str, float | None]]:
    """Seed, loss and rate, None for the best of those that came before; without a loss the model is scored as it is."""
    yield case.seeds[0], "dense", None
    yield from ((seed, "pruned", None) for seed in case.seeds)
    for losses in (case.losses[:3], case.losses[3:]):  # the two together come last, where time is short
        yield from ((GRID_SEED, loss, rate) for loss in losses for rate in case.rates)
        yield from ((seed, loss, None) for seed in case.seeds for loss in losses)


def do(case: Case, given: argparse.Namespace) -> None:
    """The cells of a case that are missing."""
    tokens = case.training["batch"] * case.data["max_length"]
    facts = {"model": case.name, "updates": case.training["steps"], "tokens": tokens}
    start = lru_cache(1)(partial(pruned, case, scratch=given.scratch))
    for seed, loss, rate in cells(case):
        known = [row for row in stored(LINES) if (row["model"], row["loss"], row["seed"]) == (case.name, loss, seed)]
        wanted = any(fnmatch(f"{case.name}/{seed}/{loss}", one) for one in given.only)
        if not wanted or any(rate in (None, row["rate"]) for row in known):
            continue
        where: Mapping[str, Any] = machine()
        found: dict[str, Any]
        if loss in LOSSES:
            used = best(stored(LINES), case.name, loss) if rate is None else rate
            found = {"rate": used, **trained(case, start(seed), loss, used, score=rate is None)}
        else:
            job = begun(case, seed, given.scratch) if loss == "dense" else start(seed)
            held = held_loss(job.model, job.held, 16 if case.windows is None else 2).mean
            zeros = sum(zeros_of(job).counted.values())
            found = {"rate": None, "zeros": zeros, "held": held, "found": scored(case, job)}
        line = {**facts, "seed": seed, "loss": loss, **found, "peak_mib": round(high_water_mib()), "machine": where}
        keep(LINES, line)


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["babyllama"])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="cells whose MODEL/SEED/LOSS fits, such as '*/100/*' for the rates"
    )
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.scratch.mkdir(parents=True, exist_ok=True)
    for name in given.models:
        do(babyllama(Path(os.environ["COMPRESSO_DATA"])) if name == "babyllama" else larger(Path(name)), given)


if __name__ == "__main__":
    main()
