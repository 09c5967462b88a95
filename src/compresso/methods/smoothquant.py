"""SmoothQuant: outliers of activations move into weights, so that both can be rounded to 8 bits (Xiao et al., arXiv
2211.10438).

Section 4, eq. 3 and 4: inputs are divided by s = max|x|^alpha / max|w|^(1 - alpha), in the norm in front of them, and
weights multiplied. Section 4, "applying SmoothQuant to transformer blocks": the linears behind a norm are smoothed; all
linears are rounded. Section 3: weights of 8 bits, one scale a matrix or a row; activations of 8 bits, one scale a token
(O1) or a tensor (O2), taken anew at
    every call. Section 2, eq. 1: both are symmetric, in steps of the largest magnitude over 127.

Departures: each block is calibrated on the outputs of the blocks before it with rounded weights, where the paper takes
the dense model's activations. Static activation scales (O3) are left out, and so are integer products of queries and
keys: attention runs as it was. Files hold the smoothed and rounded weights as full numbers, which any engine opens.
Rounding of activations is a forward patch that the records name and `compresso.load` applies; other engines run without
it. `compresso export --format compressed-tensors` writes integers, and engines of that format round what meets them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.rounding import fit_signed
from compresso.core.scales import smoothing_scale
from compresso.edit.round_inputs import Range, round_inputs_patch
from compresso.job import Job
from compresso.observe.folds import Stats
from compresso.stage import Effects, Passes, stage, sweep_passes
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed, rounded_weights
from compresso.sweep.scaling import Found, largest, rescaled
from compresso.sweep.swept import swept
from compresso.sweep.targets import Groups, Where, chosen, is_linear, names_of


@stage(
    "smoothquant",
    title="moves outliers of activations into weights, then rounds both to 8 bits",
    paper="2211.10438",
    effects=Effects.WEIGHTS | Effects.FORWARD,
    needs=("data",),
    when="Engines that multiply 8-bit integers; large models, whose activations have outliers.",
    failures=(
        "Rounding of activations lives in compresso.load and in exported compressed-tensors; elsewhere weights alone"
        " are rounded."
    ),
)
class SmoothQuant:
    """Knobs of SmoothQuant.

    Args:
        alpha: share of the difficulty that moves from activations to weights.
        weights: what shares a scale: a "matrix" or a "row".
        inputs: what shares a scale: a "token" or a "tensor" (all tokens of a call).
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
        calibration: examples, batch, activations, true_sequential; see `compresso.sweep.calibration.Calibration`.
    """

    keeps_moments: ClassVar[bool] = False

    alpha: Annotated[float, Ge(0), Le(1)] = 0.5
    weights: Literal["matrix", "row"] = "row"
    inputs: Range = "token"
    where: Where = Where()
    calibration: Calibration = Calibration()

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are rounded, fed by norms alone; needs shapes only. Raises RecipeError or ArchError."""
        found = chosen(model, arch, self.where)
        return {
            layer: [replace(g, producer=None) if g.producer and is_linear(model, g.producer.module) else g for g in of]
            for layer, of in found.items()
        }

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it rounds, and the bits they take once packed."""
        return rounded_weights(model, self.check(model, arch), 8, 0, symmetric=True)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the sweep."""
        return [sweep_passes(self, model, arch)]

    def __call__(self, job: Job) -> Job:
        """Sweep over the blocks, then round activations."""
        groups = self.check(job.model, job.arch)
        edit = rescaled(job.model, self._search, self._round)
        found, notes = swept(job.sweeping("smoothquant", self), groups, self.calibration, largest, edit, rescales=True)
        names = names_of(groups)
        patch = round_inputs_patch(self.inputs, names)
        patch.apply_(job.model)
        smoothed = {name: facts["largest_scale"] for name, facts in notes.items() if facts["scaled"]}
        job = replace(job, patches=(*job.patches, patch))
        return job.note("smoothquant", **found).note(
            "smoothquant", sparsity=None, bits=8.0, activation_bits=8, largest_scale=smoothed
        )

    def _search(self, weight: Tensor, seen: Stats) -> Found:
        scale = smoothing_scale(seen.total, weight, self.alpha)
        return scale, {"largest_scale": float(scale.max())}

    def _round(self, name: str, weight: Tensor, seen: Stats, scale: Tensor) -> Tensor:
        rows = weight if self.weights == "row" else weight.reshape(1, -1)
        return fit_signed(rows, 8).round(rows).reshape(weight.shape)
