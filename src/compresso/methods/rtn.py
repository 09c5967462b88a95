"""Rounding to the nearest point of a uniform grid: the baseline of weight quantization. Needs no data.

One grid a row, or one for each group of inputs of a row (ZeroQuant, arXiv 2206.01861, section 4.1, group-wise weights);
grids are those of `compresso.core.rounding`.

Stacked experts are rounded as the linears that they are; routers are left as they are.

Departure: values are rounded and stored as full numbers, so this shows what rounding costs, not what packing saves.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, cast

import torch
from annotated_types import Ge, Le
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.rounding import fit
from compresso.job import Job
from compresso.stage import Effects, Passes, Stage, stage
from compresso.sweep.audit import audit, fingerprints
from compresso.sweep.compressed import Compressed, fitting_group, other_group, rounded_weights
from compresso.sweep.finite import check_weights
from compresso.sweep.targets import Groups, Where, chosen, matrix, names_of
from compresso.training.progress import PATIENCE

log = logging.getLogger(__name__)


@stage(
    "rtn",
    title="rounds weights to the nearest of a few values",
    paper="2206.01861",
    effects=Effects.WEIGHTS,
    when="As the baseline of quantization; at 8 bits hardly anything is lost.",
    failures=(
        "Below 4 bits, or without groups at 4, quality falls; gptq holds longer. Values are stored as full numbers."
    ),
)
class Rtn:
    """Knobs of rounding to nearest.

    Args:
        bits: of a code, 2 to 8.
        group: consecutive inputs that share a scale; 0 for one scale a row. Where it does not divide all inputs, the
            largest group that divides it and them.
        symmetric: a range around 0 instead of from the least to the greatest weight.
        clip: shrink ranges where that lowers the error.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
    """

    bits: Annotated[int, Ge(2), Le(8)] = 4
    group: Annotated[int, Ge(0)] = 0
    symmetric: bool = False
    clip: bool = False
    where: Where = Where()

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are rounded; needs shapes only. Raises RecipeError or ArchError."""
        return chosen(model, arch, self.where, fitting_group(self, model, arch, experts=True) or 1, experts=True)

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it rounds, and the bits they take once packed."""
        group = fitting_group(self, model, arch, experts=True)
        return rounded_weights(model, self.check(model, arch), self.bits, group, self.symmetric)

    def remarks(self, model: PreTrainedModel, arch: Arch) -> list[str]:
        """Another group than was asked for."""
        return other_group(self, model, arch, experts=True)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """None: it reads weights alone."""
        return []

    @torch.no_grad()
    def __call__(self, job: Job) -> Job:
        """Round every linear."""
        fitted: Stage = replace(cast(Any, self), group=fitting_group(self, job.model, job.arch, experts=True))
        if fitted != self:
            log.warning("rtn: %s", "; ".join(self.remarks(job.model, job.arch)))
            return fitted(job)
        groups, bits = self.check(job.model, job.arch), self.compressed(job.model, job.arch).bits
        check_weights(job.model, groups)
        before, names = fingerprints(job.weights.tensors()), names_of(groups)
        shown = job.progress()
        with shown.running(len(names), 0, "rtn", patience=PATIENCE):
            for done, name in enumerate(names, start=1):
                weight = matrix(job.model, name)
                exact = weight.float()
                grid = fit(exact, self.bits, group=self.group, symmetric=self.symmetric, clip=self.clip)
                weight.copy_(grid.round(exact))
                shown.step(done, "rtn", {}, 0)
        facts = audit(job.weights.tensors(), before, names)
        return job.note("rtn", **{**facts, "sparsity": None, "bits": bits, "group": self.group})
