"""AWQ: the inputs with large activations get larger weights before rounding, so that they lose less (Lin et al., arXiv
2306.00978).

Section 3.2, eq. 4 and 5: W diag(s) is rounded, and x / s comes from what feeds the layer: the norm in front of it, v
    for o, up for down. s = a^r with a the mean |x| of each input; r is searched on a grid of 20.
Authors' code: these scales; then the range of each group is clamped where that lowers the error of its outputs, but not
    in q and k, and weights are rounded to nearest.
AutoAWQ, the other public tool, has s = a^r / w^(1 - r), w the typical weight: `by_weight`, recipe awq/4-g128-autoawq.

Departures: the error is that of the linears' own outputs over all calibration tokens, by their second moment; the
authors' code runs the attention or the MLP around them on the tokens. Not to scale is a candidate, too. Each block is
calibrated on the outputs of the rounded blocks before it, where the authors' code takes those of the dense ones. A
group whose inputs nothing feeds linearly (o under grouped queries, an FFN without a gate, fused projections), or of
which `where` leaves a part out, is rounded without a scale, and the records say so. Of a mixture of experts the norm in
front gets one scale for the first matrices of all experts and a shared expert, each judged on its own tokens; the
router's weights take it up, too, and choose as before, so that they change and are not rounded (with
`true_sequential` a shared expert keeps the norm of its mixture as it is). An expert that no calibration token chose is
rounded to the nearest, which is said. Values are stored as full numbers, so this shows what rounding costs, not what
packing saves.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Le
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.rounding import fit
from compresso.core.scales import activation_scales, best_common_scale, best_scale, round_clipped
from compresso.job import Job
from compresso.observe.folds import Stats
from compresso.stage import Effects, Passes, Stage, stage, sweep_passes
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed, fitting_group, other_group, rounded_weights
from compresso.sweep.scaling import Found, moment_and_size, rescaled
from compresso.sweep.shared_scale import ScaledTogether
from compresso.sweep.swept import swept
from compresso.sweep.targets import Groups, Where, chosen, matches

log = logging.getLogger(__name__)


@stage(
    "awq",
    title="scales up the weights that large activations meet, then rounds",
    paper="2306.00978",
    effects=Effects.WEIGHTS,
    needs=("data",),
    when="Weights of 3 or 4 bits in groups, where few examples are at hand; it fits them less than gptq does.",
    failures=(
        "At 3 bits small models lose much. Values are stored as full numbers. o is not scaled under grouped-query"
        " attention."
    ),
)
class Awq:
    """Knobs of AWQ.

    Args:
        bits: of a code, 2 to 8.
        group: consecutive inputs that share a rounding scale; 0 for one a row. Where it does not divide all inputs,
            the largest group that divides it and them.
        symmetric: a range around 0 instead of from the least to the greatest weight.
        steps: exponents that are tried.
        by_weight: also divide by the typical weight, as AutoAWQ does and the authors do not.
        clip: clamp ranges where that lowers the error of the outputs.
        unclipped: patterns of linears that are not clamped.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
        calibration: examples, batch, activations, true_sequential; see `compresso.sweep.calibration.Calibration`.
    """

    keeps_moments: ClassVar[bool] = True
    """Its statistic is a second moment, [in, in]."""

    bits: Annotated[int, Ge(2), Le(8)] = 4
    group: Annotated[int, Ge(0)] = 128
    symmetric: bool = False
    steps: Annotated[int, Ge(1)] = 20
    by_weight: bool = False
    clip: bool = True
    unclipped: tuple[str, ...] = ("*q_proj", "*k_proj", "*qkv_proj", "*query*", "*c_attn")
    where: Where = Where()
    calibration: Calibration = Calibration()

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
            log.warning("awq: %s", "; ".join(self.remarks(job.model, job.arch)))
            return fitted(job)
        groups, bits = self.check(job.model, job.arch), self.compressed(job.model, job.arch).bits
        edit = ScaledTogether(job.model, rescaled(job.model, self._search, self._round), self._search_common)
        found, notes = swept(job.sweeping("awq", self), groups, self.calibration, moment_and_size, edit, rescales=True)
        return job.note("awq", **found).note(
            "awq",
            sparsity=None,
            bits=bits,
            group=self.group,
            exponents={name: facts["exponent"] for name, facts in notes.items() if facts["scaled"]},
            error_of_unscaled={name: facts["error_of_unscaled"] for name, facts in notes.items() if facts["scaled"]},
            not_scaled=[name for name, facts in notes.items() if not facts["scaled"]],
        )

    def _nearest(self, weight: Tensor) -> Tensor:
        return fit(weight, self.bits, group=self.group, symmetric=self.symmetric).round(weight)

    def _search(self, weight: Tensor, seen: Stats) -> Found:
        """The scale whose rounded weights change the group's outputs least."""
        moment, size = seen.total[:-1] / seen.n, seen.total[-1] / seen.n
        candidates = activation_scales(size, weight, self.group, self.steps, self.by_weight)
        exponent, scale, least, plain = best_scale(weight, moment, candidates, self._nearest)
        return scale, {"exponent": exponent, "error_of_unscaled": least / plain if plain else 1.0}

    def _search_common(self, pieces: Sequence[tuple[Tensor, Stats]]) -> Found:
        """The scale of a mixture's norm whose rounded experts change their outputs least, each for its own tokens."""
        tokens = sum(seen.n for _, seen in pieces)
        size = sum(seen.total[-1] for _, seen in pieces) / tokens
        whole = torch.cat([weight for weight, _ in pieces]) if self.by_weight else pieces[0][0]
        moments = [(weight, seen.total[:-1] / tokens) for weight, seen in pieces]
        candidates = activation_scales(cast(Tensor, size), whole, self.group, self.steps, self.by_weight)
        exponent, scale, least, plain = best_common_scale(moments, candidates, self._nearest)
        return scale, {"exponent": exponent, "error_of_unscaled": least / plain if plain else 1.0}

    def _round(self, name: str, weight: Tensor, seen: Stats, scale: Tensor) -> Tensor:
        """A linear's scaled weights, clamped and rounded."""
        if not self.clip or not seen.n or matches(name, self.unclipped):
            return self._nearest(weight)
        moment = seen.total[:-1] / (seen.n * scale[:, None] * scale)
        return round_clipped(weight, moment, self.bits, group=self.group, symmetric=self.symmetric)
