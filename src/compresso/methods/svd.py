"""Low rank: each linear becomes the product of two smaller ones, by singular values, plain or whitened by its inputs
(SVD-LLM, Wang et al., arXiv 2403.07378).

Section 3.1, truncation-aware data whitening: S is the Cholesky factor of X X^T, the second moment of a linear's inputs;
    W S is truncated, and W' = U_k S_k V_k^T S^-1, whose loss is the sum of the squares dropped (theorems 3.1 to 3.3);
    `compresso.core.low_rank`. `whiten: none` is the plain truncation that papers compare with.
Authors' code: rank k = floor(keep m n / (m + n)), the same share of every linear; sqrt(S_k) goes to either side.

What is written. No stock class of transformers has linears of two factors (DeepSeek's q_a and q_b lie around a norm of
their own), and neither has GGUF, ONNX aside from graphs of its own, or vLLM for a LLaMA. An adapter beside a dense base
would be read, but it is larger than the model. So a run puts the products in the weights' place: a stock folder that
every engine opens, no smaller, as the records and the card say. `compresso export --format low-rank` writes the
factors: fewer numbers and multiplications, opened by transformers alone, through a modelling file of ours. It finds the
ranks in the weights, so that a later stage of the run that keeps them low (recovery by LoRA, whose rank adds to theirs)
is exported, and one that does not (rounding, zeros, full training) is refused. A run knows nothing of those before it.

First version, section 3.2, sequential update (`moments: updated`): with the right factor kept, the left one is the
    least squares fit of the dense linear's outputs on the inputs that the blocks already truncated give.

Departures: by default the second moment is that of the outputs of the blocks already truncated, where the authors'
whitening takes those of the dense model (`moments: dense`); with it the sequential update changes nothing, since the
truncation is the fit already. It is damped by 1e-6 of its mean diagonal at once, tenfold until it can be factored,
where the authors add what makes the least eigenvalue 1e-6 only if it cannot be (guessed: the size, and that it is a
share). q, k, v, and gate, up, share one factor of it. LoRA on first one factor, then the other, is `train: factors` of
the stage `recover`, whose default tunes the product. Calibration rows are the run's, not WikiText-2 by itself. With few
tokens a column the whitened truncation fits them alone.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, ClassVar

from annotated_types import Gt, Le, Lt
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.job import Job
from compresso.observe.folds import second_moment
from compresso.stage import Effects, Passes, stage, sweep_passes
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed
from compresso.sweep.low_rank import factored_weights, of_dense_low_rank, of_low_rank, ranks_of
from compresso.sweep.one_shot import more_damped
from compresso.sweep.swept import swept
from compresso.sweep.targets import Groups, Where, chosen


class Moments(StrEnum):
    """Whose inputs a truncation is whitened by."""

    COMPRESSED = "compressed"
    """What the blocks already truncated give."""
    DENSE = "dense"
    """What the dense model gives, as published."""
    UPDATED = "updated"
    """What the dense model gives; then the left factors are fitted to what the blocks already truncated give."""


class Whiten(StrEnum):
    """What a truncation keeps most of."""

    NONE = "none"
    """The matrix."""
    ACTIVATIONS = "activations"
    """Its outputs on the calibration's tokens."""


@stage(
    "svd",
    title="gives each linear a low rank, so that two smaller ones can take its place",
    paper="2403.07378",
    effects=Effects.WEIGHTS,
    needs=("data",),
    when="Fewer parameters and multiplications at any width, without removing a unit; at most about a fifth of them.",
    failures=(
        "Saves nothing before compresso export --format low-rank, which transformers alone opens, and maybe no time"
        " then. Plain, it destroys language models. Rounding afterwards gives the full rank back."
    ),
)
class Svd:
    """Knobs of the low rank.

    Args:
        keep: share of the numbers of each linear that its two factors have together.
        whiten: "activations", or "none" for the plain truncation, which looks at data to say what it loses.
        damping: share of the second moment's mean diagonal that is added to it; more where it cannot be factored.
        moments: whose inputs count: "compressed" (of the blocks already truncated), "dense" (of the dense model), or
            "updated": of the dense model, and then the left factors are fitted to what the truncated blocks give.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
        calibration: examples, batch, activations, true_sequential; see `compresso.sweep.calibration.Calibration`.
    """

    keeps_moments: ClassVar[bool] = True
    """Its statistic is a second moment, [in, in]."""

    keep: Annotated[float, Gt(0), Lt(1)] = 0.8
    whiten: Whiten = Whiten.ACTIVATIONS
    damping: Annotated[float, Gt(0), Le(0.01)] = 1e-6
    moments: Moments = Moments.COMPRESSED
    where: Where = Where()
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        """Refuse moments that nothing is whitened by."""
        if self.whiten == Whiten.NONE and self.moments != Moments.COMPRESSED:
            raise ValueError(f"moments: {self.moments} are for whitening, and whiten is none; leave moments out")

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are truncated; needs shapes only. Raises RecipeError or ArchError."""
        groups = chosen(model, arch, self.where)
        ranks_of(model, groups, self.keep)
        return groups

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it works on, and how many numbers their factors have."""
        return factored_weights(model, ranks_of(model, self.check(model, arch), self.keep))

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the sweep."""
        return [sweep_passes(self, model, arch, looks=int(self.moments != Moments.COMPRESSED))]

    def __call__(self, job: Job) -> Job:
        """Sweep over the blocks."""
        groups, run = self.check(job.model, job.arch), job.sweeping("svd", self)
        ranks, numbers = ranks_of(job.model, groups, self.keep), self.compressed(job.model, job.arch)
        if self.moments == Moments.COMPRESSED:
            edit = of_low_rank(job.model, ranks, self.whiten == Whiten.ACTIVATIONS, self.damping)
        else:
            edit = of_dense_low_rank(job.model, ranks, self.moments == Moments.UPDATED, self.damping)
        found, notes = swept(run, groups, self.calibration, second_moment, edit)
        damped = {} if self.whiten == Whiten.NONE else more_damped(notes, self.damping)
        return job.note("svd", **found).note(
            "svd",
            sparsity=None,
            whiten=str(self.whiten),
            moments=str(self.moments),
            ranks=ranks,
            weights=numbers.weights,
            factored=numbers.factored,
            error={name: facts["error"] for name, facts in notes.items()},
            damped_more=damped,
        )
