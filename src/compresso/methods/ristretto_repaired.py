"""How far candidates of the evolution are from dense once they are repaired; no method.

A repair turns the order of candidates round: where whole layers left it brings back most of what was lost, where widths
left, whose weights the bank has fitted already, little. So an evolution whose result is repaired has to be led by
repaired candidates. Each is built as a smaller model and repaired on some rows, with one ridge and the residual target
alone, and compared on others, which neither the bank nor repairs have seen: on the bank's own rows widths look nearer
than they are.
"""

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compresso.core.counted import counted
from compresso.core.row import Row
from compresso.errors import DataError, NumericError
from compresso.job import Job
from compresso.methods.ristretto_judge import Build
from compresso.metrics.divergence import MAX_BYTES, divergence, reference
from compresso.solve.level_choice import Levels
from compresso.sweep.calibration import Calibration
from compresso.sweep.least_squares import Fit
from compresso.sweep.lost import lost
from compresso.sweep.repair import Calibrated, repair_
from compresso.sweep.two_streams import Known
from compresso.training.noise import mixed_seed

FIT = Fit(alphas=(1.0,), ridges=(0.3,))
"""Of repairs in the search."""
HELD = 0.2
"""Share of the rows to repair on that says whether a fit helps."""


def few_rows(job: Job, most: int) -> Job:
    """The job with at most so many of its rows, drawn without repetition: the first ones may be of one source.

    Raises:
        DataError: fewer than 2.
    """
    n = min(most, len(job.rows))
    if n < 2:
        raise DataError(
            f"{counted(n, 'row')} to repair candidates on: they are fitted to some and chosen by others; give more"
            " data, or repaired_rows: 0"
        )
    generator = torch.Generator().manual_seed(mixed_seed("repaired rows", job.seed))
    return replace(job, rows=[job.rows[i] for i in torch.randperm(len(job.rows), generator=generator)[:n].tolist()])


class RepairedDivergence:
    """The fitness of repaired candidates; a `compresso.solve.evolve.Fitness`.

    Args:
        build: the smaller model.
        job: with the rows that repairs see, at least 2; its model, dense, stays as it is.
        batch: of these rows, a forward pass.
        rows: to compare on, none of them the job's.
        stages: how many of these each stage takes, the first ones.
    """

    def __init__(self, build: Build, job: Job, batch: int, rows: Sequence[Row], stages: Sequence[int]) -> None:
        self._build, self._job, self._stages = build, job, tuple(stages)
        n = max(1, round(len(job.rows) * HELD))
        calibration = Calibration(len(job.rows), batch)
        self._data = Calibrated(calibration.batches(job.rows[n:], 0), calibration.batches(job.rows[:n], 0))
        self._known = Known()
        room = MAX_BYTES // max(len(rows), 1)
        self._references = [
            reference(job.model, [row["input_ids"]], corpus="compared", max_bytes=room, batch_size=1) for row in rows
        ]

    @property
    def facts(self) -> dict[str, int]:
        """What is compared, for the records."""
        return {
            "tokens": sum(len(window) for one in self._references for window in one.windows),
            "compared": sum(len(one.places) for one in self._references),
            "repaired_rows": len(self._job.rows),
        }

    def __call__(self, levels: Levels, stage: int, /) -> float:
        """Mean KL(dense || repaired candidate) in nats a token on the rows of a stage; NaN where it is not finite."""
        try:
            model = self._repaired(levels)
            found = [
                (divergence(model, one)[0].value, len(one.places)) for one in self._references[: self._stages[stage]]
            ]
        except NumericError:
            return math.nan
        return sum(value * n for value, n in found) / sum(n for _, n in found)

    def _repaired(self, levels: Levels) -> PreTrainedModel:
        """A candidate with what makes up for what left."""
        dense, arch = self._job.model, self._job.arch
        with tempfile.TemporaryDirectory() as folder:
            smaller = self._build(replace(self._job, model=copy.deepcopy(dense), out=Path(folder), quiet=True), levels)
        layers = smaller.plan.kept.get("layers", tuple(range(len(arch.blocks(dense)))))
        gone = lost(dense, smaller.model, arch, layers)
        repair_(dense, smaller.model, arch, gone, layers, None, self._data, FIT, None, known=self._known)
        return smaller.model
