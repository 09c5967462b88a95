"""What the tables of encoders share: stages on a live model without a run's folders around them, accuracy by example,
and paired differences.
"""

import copy
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compresso.checkpoint.load import load_model
from compresso.core.row import Row
from compresso.data.registry import load_records
from compresso.edit.stock import as_stock
from compresso.job import Job
from compresso.runner.first_job import new_job
from compresso.runner.options import with_options
from compresso.runner.preflight import Prepared, prepare
from compresso.stage import Stage
from compresso.tasks.base import Reading

BENCH = "datasets/bench"
_T = {2: 4.303, 3: 3.182, 4: 2.776}
"""Student's t, two-sided 95 %, by degrees of freedom."""


@dataclass(frozen=True)
class Ready:
    """A recipe on a model and its data, before anything ran.

    Args:
        prepared: by which jobs are made.
        scratch: where stages keep their training checkpoints, each in a folder that is deleted behind it.
    """

    prepared: Prepared
    scratch: Path

    @property
    def stages(self) -> Mapping[str, Stage]:
        """By name, in order."""
        return dict(self.prepared.recipe.stages)

    def job(self, seed: int, model: PreTrainedModel | None = None) -> Job:
        """A job with a model: a copy of the given one, or the weights that the recipe was prepared for."""
        job = new_job(self.prepared, self.scratch, quiet=True)
        if model is None:
            model = as_stock(load_model(self.prepared.source, dtype=torch.float32, device=torch.device("cpu")))
        return taught_by(replace(job, model=copy.deepcopy(model), seed=seed), model)

    def rows(self, file: Path, config: Any, max_length: int) -> Sequence[Row]:
        """Examples of another file, for a model that has its head."""
        task = self.prepared.recipe.task
        records = load_records(file, form=task.form)
        return task.encode(records, self.prepared.tokenizer, Reading(max_length), config).rows


def ready(
    recipe: str | Mapping[str, Any], model: str, data: Path | str, task: str, sets: Sequence[str], scratch: Path
) -> Ready:
    """As `compresso run RECIPE --model MODEL --data DATA --task TASK --set ...` checks and reads it."""
    raw = with_options(recipe, model=model, sets=sets, task=task)
    prepared = prepare(
        raw,
        model,
        str(data),
        output=scratch / "unwritten",
        layout="auto",
        seed=0,
        device="cpu",
        overwrite=False,
        skip_bad=False,
        quiet=True,
    )
    return Ready(prepared, scratch)


def taught_by(job: Job, dense: PreTrainedModel) -> Job:
    """The job with a dense model that its teacher is a copy of."""
    return replace(job, original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype))


def run(stage: Stage, job: Job) -> Job:
    """A stage in a folder of its own, deleted afterwards: nothing is resumed."""
    job.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.out) as folder:
        return replace(stage(replace(job, out=Path(folder))), out=job.out)


def packed(right: Sequence[bool]) -> str:
    """Which examples were right, as hexadecimal digits.

    >>> packed([True, False, False, True, True])
    '98'
    """
    bits = "".join("01"[one] for one in right)
    bits += "0" * (-len(bits) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def unpacked(digits: str, n: int) -> list[bool]:
    """The inverse of `packed`, of `n` examples.

    >>> unpacked("98", 5)
    [True, False, False, True, True]
    """
    return [bit == "1" for bit in f"{int(digits, 16):0{4 * len(digits)}b}"[:n]]


@dataclass(frozen=True)
class Difference:
    """Points of accuracy between two models of each seed, of the same examples.

    Args:
        each: of each seed.
        of_seeds: half of a 95 % interval of their mean, Student's t over seeds; None of one seed.
        of_examples: the same over examples, each with its mean over seeds.
    """

    each: tuple[float, ...]
    of_seeds: float | None
    of_examples: float

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.each)


def difference(ours: Sequence[Sequence[bool]], theirs: Sequence[Sequence[bool]]) -> Difference:
    """What `ours` are above `theirs`; a list of examples a seed.

    >>> difference([[True, True], [True, False]], [[True, False], [True, False]]).each
    (50.0, 0.0)
    """
    pairs = [[100 * (a - b) for a, b in zip(*seed, strict=True)] for seed in zip(ours, theirs, strict=True)]
    each = tuple(statistics.fmean(seed) for seed in pairs)
    examples = [statistics.fmean(one) for one in zip(*pairs, strict=True)]
    error = 1.96 * statistics.stdev(examples) / math.sqrt(len(examples))
    n = len(each)
    return Difference(each, _T[n - 1] * statistics.stdev(each) / math.sqrt(n) if n > 2 else None, error)
