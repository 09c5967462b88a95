"""OWL: blocks with many outlying scores lose fewer weights (Yin et al., arXiv 2310.05175); the rest is Wanda or
SparseGPT.

Section 3.1, eq. 1: a block's share of Wanda scores above M times their mean, over all its linears together, on the
dense model. Section 3.2: shares of zeros follow from them, `spread` (lambda) around the one asked for;
`compresso.core.sparsity.outlier_weighted`. Then a sweep as in `wanda` or `sparsegpt`, each block at its own share.

Departures: the mean share is of blocks, as in the authors' code; blocks of unequal size miss the total a little, and
the records say by how much. Scores of the first pass are taken on the run's calibration rows, those of the sweep.
Magnitude as a base and the n:m form of the authors' code are not here. Counts are exact, and ties leave by index.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.sparsity import lowest_in_rows, outlier_weighted, outliers, wanda_score
from compresso.job import Job
from compresso.observe.folds import Stats, second_moment, squares
from compresso.stage import Effects, Passes, stage, sweep_passes
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed, zeroed_weights
from compresso.sweep.one_shot import compensated, more_damped, obs_choice, zeroed
from compresso.sweep.sweep import sweep
from compresso.sweep.swept import swept
from compresso.sweep.targets import Group, Groups, Where, chosen, matrix
from compresso.training.noise import mixed_seed


@stage(
    "owl",
    title="zeros more weights in blocks with few outliers, by Wanda or SparseGPT",
    paper="2310.05175",
    effects=Effects.WEIGHTS,
    needs=("data",),
    when="From about 70 % of zeros on, where equal shares break the blocks that carry outliers.",
    failures=(
        "At half it helps little or harms. Zeros stored dense save no bytes and no time without a kernel for them."
    ),
    zeroes={},
)
class Owl:
    """Knobs of OWL.

    Args:
        sparsity: share of weights that become zero, the mean over blocks.
        base: what chooses within a block: "wanda" or "sparsegpt".
        spread: lambda; shares of blocks lie up to twice that apart.
        times: M; scores above so many times the block's mean are outliers.
        damping, block: of base "sparsegpt".
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
        calibration: examples, batch, activations, true_sequential; see `compresso.sweep.calibration.Calibration`.
    """

    keeps_moments: ClassVar[bool] = True
    """Its statistic is a second moment, [in, in]."""

    sparsity: Annotated[float, Gt(0), Lt(1)] = 0.7
    base: Literal["wanda", "sparsegpt"] = "wanda"
    spread: Annotated[float, Ge(0), Lt(0.5)] = 0.08
    times: Annotated[float, Gt(0)] = 5
    damping: Annotated[float, Gt(0), Le(1)] = 0.01
    block: Annotated[int, Ge(1)] = 128
    where: Where = Where()
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        """Refuse a spread that reaches a whole block."""
        if self.sparsity + 2 * self.spread >= 1:
            raise ValueError(
                f"sparsity={self.sparsity} and spread={self.spread} could zero whole blocks; wanted sparsity + 2"
                " spread < 1"
            )

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are pruned; needs shapes only. Raises RecipeError or ArchError."""
        return chosen(model, arch, self.where)

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it works on, and the share that becomes zero."""
        return zeroed_weights(model, self.check(model, arch), self.sparsity, None)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the look at the dense model and of the sweep."""
        return [sweep_passes(self, model, arch, looks=1)]

    def __call__(self, job: Job) -> Job:
        """Look at the dense model, share out, sweep."""
        groups = self.check(job.model, job.arch)
        outlying = self._outlying(job, groups)
        shares = dict(zip(groups, outlier_weighted(outlying, self.sparsity, self.spread), strict=True))
        if self.base == "wanda":
            edit = zeroed(job.model, lambda group, score: (lowest_in_rows(score, shares[group.layer]), {}))
            found, notes = swept(job.sweeping("owl", self), groups, self.calibration, squares, edit)
        else:
            edit = compensated(
                job.model,
                choose=lambda group, scores: obs_choice(shares[group.layer], None, "exact")(group, scores),
                every=self.block,
                damping=self.damping,
                block=self.block,
            )
            found, notes = swept(job.sweeping("owl", self), groups, self.calibration, second_moment, edit)
        return job.note("owl", **found).note(
            "owl",
            outliers_percent={str(layer): value for layer, value in zip(groups, outlying, strict=True)},
            shares={str(layer): share for layer, share in shares.items()},
            damped_more=more_damped(notes, self.damping),
        )

    def _outlying(self, job: Job, groups: Groups) -> list[float]:
        """Percentage of outliers of each layer that is worked on, in order."""
        read: dict[str, Tensor] = {}
        found: dict[int, float] = {}

        def look(group: Group, seen: Stats) -> dict[str, Any]:
            read.update(dict.fromkeys(group.names, seen.total))
            if group is groups[group.layer][-1]:  # the block's last: its weights may be gone after it
                found[group.layer] = outliers(
                    [wanda_score(matrix(job.model, name), total) for name, total in read.items()], self.times
                )
                read.clear()
            return {}

        batches = self.calibration.batches(job.rows, mixed_seed("owl", job.seed))
        sweep(
            job.model,
            job.arch,
            groups,
            batches,
            squares,
            look,
            place=self.calibration.activations,
            scratch=job.out / "look",
            collect_only=True,
            offloaded=job.offloaded,
            ranks=job.ranks,
        )
        return [found[layer] for layer in groups]
