"""GPTQ: weights are rounded column by column, and those to the right make up for it (Frantar et al., arXiv 2210.17323).

Section 3, step 1: one order of columns for all rows; `act_order` takes the inputs with the largest second moments first
    (the authors' code, after the paper).
Section 3, step 2: lazy updates in blocks of 128 columns.
Section 3, step 3: the Cholesky factor of the inverse of the damped second moment; all three in `compresso.core.obs`.
Grids: per row, or per group of inputs, fitted to the compensated weights when the sweep reaches the group.

Departures: with `act_order` the grids of groups are fitted to the weights before anything is done, in their own order,
so that groups stay contiguous (the authors' `static_groups`); other grids would need an index for each input. q, k, v,
and gate, up, share one second moment. Where it cannot be factored, damping grows tenfold up to three times, then in
float64, then the run stops. An expert's second moment is that of its own tokens; one that no calibration token chose is
rounded to the nearest, which is said. Routers stay as they are. Values are stored as full numbers, so this shows what
rounding costs, not what packing saves.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, cast

from annotated_types import Ge, Gt, Le
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.obs import Quantize
from compresso.core.rounding import Grid, fit
from compresso.job import Job
from compresso.observe.folds import second_moment
from compresso.stage import Effects, Passes, Stage, stage, sweep_passes
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed, fitting_group, other_group, rounded_weights
from compresso.sweep.one_shot import compensated, more_damped
from compresso.sweep.swept import swept
from compresso.sweep.targets import Groups, Where, chosen

log = logging.getLogger(__name__)


@stage(
    "gptq",
    title="rounds weights to a few values and lets those that are left make up for it",
    paper="2210.17323",
    effects=Effects.WEIGHTS,
    needs=("data",),
    when="Weights of 3 or 4 bits, after everything else; 128 long examples of the text that will be read.",
    failures="Few or foreign examples: it fits them and loses elsewhere. Values are stored as full numbers.",
)
class Gptq:
    """Knobs of GPTQ.

    Args:
        bits: of a code, 2 to 8.
        group: consecutive inputs that share a scale; 0 for one scale a row. Where it does not divide all inputs, the
            largest group that divides it and them.
        symmetric: a range around 0 instead of from the least to the greatest weight.
        clip: shrink ranges where that lowers the rounding error.
        act_order: round the inputs with the largest second moments first.
        damping: share of the second moment's mean diagonal that is added to it.
        block: columns updated together; one of it and `group` divides the other.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
        calibration: examples, batch, activations, true_sequential; see `compresso.sweep.calibration.Calibration`.
    """

    keeps_moments: ClassVar[bool] = True
    """Its statistic is a second moment, [in, in]."""

    bits: Annotated[int, Ge(2), Le(8)] = 4
    group: Annotated[int, Ge(0)] = 0
    symmetric: bool = False
    clip: bool = False
    act_order: bool = False
    damping: Annotated[float, Gt(0), Le(1)] = 0.01
    block: Annotated[int, Ge(1)] = 128
    where: Where = Where()
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        """Refuse groups that blocks would cut."""
        if self.group and max(self.block, self.group) % min(self.block, self.group):
            raise ValueError(f"block={self.block} cuts groups of {self.group}; make one a multiple of the other")

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
        """The passes of the sweep."""
        return [sweep_passes(self, model, arch)]

    def __call__(self, job: Job) -> Job:
        """Sweep over the blocks."""
        fitted: Stage = replace(cast(Any, self), group=fitting_group(self, job.model, job.arch, experts=True))
        if fitted != self:
            log.warning("gptq: %s", "; ".join(self.remarks(job.model, job.arch)))
            return fitted(job)
        groups, bits = self.check(job.model, job.arch), self.compressed(job.model, job.arch).bits
        edit = compensated(
            job.model,
            quantize=self._rounding,
            in_order=self.act_order,
            damping=self.damping,
            block=max(self.block, self.group),
        )
        found, notes = swept(job.sweeping("gptq", self), groups, self.calibration, second_moment, edit)
        return job.note("gptq", **found).note(
            "gptq",
            sparsity=None,
            bits=bits,
            group=self.group,
            loss={name: facts["loss"] for name, facts in notes.items()},
            damped_more=more_damped(notes, self.damping),
        )

    def _fit(self, weight: Tensor, group: int) -> Grid:
        return fit(weight, self.bits, group=group, symmetric=self.symmetric, clip=self.clip)

    def _rounding(self, weight: Tensor, order: Tensor) -> Quantize:
        """How a column is rounded: to grids of the weights as they were, or of each group as the sweep finds it."""
        grid = self._fit(weight, self.group if self.act_order else 0)
        columns = order.tolist()
        if not self.group or self.act_order:
            return lambda left, j: grid.round(left[:, :1], columns[j]).squeeze(1)

        def by_group(left: Tensor, j: int) -> Tensor:
            nonlocal grid
            if j % self.group == 0:
                grid = self._fit(left[:, : self.group], 0)
            return grid.round(left[:, :1]).squeeze(1)

        return by_group
