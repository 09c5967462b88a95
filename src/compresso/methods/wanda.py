"""Wanda: weights leave where |W_ij| ||x_j|| is small, in each output row alike (Sun et al., arXiv 2306.11695). Nothing
is updated.

Section 3, eq. 1, the score: `compresso.core.sparsity.wanda_score`, the norm over all calibration tokens. Section 3,
comparison group: each output row loses floor(share * inputs) entries; or n of every m inputs stay. The variant of the
authors' code (`use_variant`): rows lose equal shares of their score instead, one alpha a matrix (`variant: true`).
Section 4, procedure: block after block, each calibrated on the outputs of the pruned blocks before it
(`compresso.sweep.sweep`).

Departures: n:m means n kept, while the authors' `prune_n` counts those removed. q, k, v, and gate, up, share one
statistic: they read the same inputs. The last block is not run again. Ties leave by index, as in a stable sort.
Calibration rows are the run's, not C4 by itself. Experts are pruned by what their own tokens bring them, whatever
weight the router gives to what they write; one that no calibration token chose loses its smallest weights, which is
said. Routers stay as they are. Attention alone (`where: {modules: ["*.self_attn.*"]}`) is the pruning of arXiv
2401.10862.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Lt
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.sparsity import lowest_in_groups, lowest_in_rows, lowest_mass, parse_pattern
from compresso.job import Job
from compresso.observe.folds import squares
from compresso.stage import Effects, Passes, search_passes, stage, sweep_passes
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed, zeroed_weights
from compresso.sweep.one_shot import zeroed
from compresso.sweep.share_search import searched_shares
from compresso.sweep.shares import ShareAllocation, ShareSearch, in_rows
from compresso.sweep.swept import swept
from compresso.sweep.targets import Groups, Where, chosen


@stage(
    "wanda",
    title="zeros the weights with the smallest product of size and input norm, row by row",
    paper="2306.11695",
    effects=Effects.WEIGHTS,
    needs=("data",),
    when="Zeros in seconds, up to about half of the weights, or 2:4 for hardware that has it.",
    failures=(
        "Zeros stored dense save no bytes and no time without a kernel for them. Past half, sparsegpt holds longer."
    ),
    zeroes={},
)
class Wanda:
    """Knobs of Wanda.

    Args:
        sparsity: share of each row's weights that become zero; 0.5 if no pattern is given either.
        pattern: "n:m" instead: n of every m consecutive inputs are kept.
        variant: rows lose equal shares of their score, not of their weights.
        allocation: of zeros to layers: "uniform", or found by search: "dp" or "evolve", of the same number in all.
        search: of allocations that are found; see `compresso.sweep.shares.ShareSearch`.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
        calibration: examples, batch, activations, true_sequential; see `compresso.sweep.calibration.Calibration`.
    """

    keeps_moments: ClassVar[bool] = False

    sparsity: Annotated[float, Ge(0), Lt(1)] | None = None
    pattern: str | None = None
    variant: bool = False
    allocation: ShareAllocation = ShareAllocation.UNIFORM
    search: ShareSearch = ShareSearch()
    where: Where = Where()
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other."""
        if self.pattern is not None:
            parse_pattern(self.pattern)
            if self.sparsity is not None or self.variant:
                raise ValueError(
                    f"pattern={self.pattern} says how many weights each row loses; set sparsity to null and variant to"
                    " false"
                )
        if self.allocation != ShareAllocation.UNIFORM and (self.pattern is not None or self.variant):
            raise ValueError(
                f"allocation={self.allocation} gives each layer a share; leave pattern out and set variant to false"
            )

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are pruned; needs shapes only. Raises RecipeError or ArchError."""
        return chosen(model, arch, self.where, parse_pattern(self.pattern)[1] if self.pattern else 1, experts=True)

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it works on, and the share that becomes zero."""
        return zeroed_weights(model, self.check(model, arch), self.sparsity, self.pattern)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the sweep, and those of the search for shares."""
        return [sweep_passes(self, model, arch), *search_passes(self, model, arch, self.calibration.examples)]

    def __call__(self, job: Job) -> Job:
        """Sweep over the blocks."""
        groups, run = self.check(job.model, job.arch), job.sweeping("wanda", self)
        share = 0.5 if self.sparsity is None else self.sparsity
        shares = searched_shares(
            run,
            groups,
            self.calibration,
            squares,
            lambda one: zeroed(job.model, lambda _, score: (lowest_in_rows(score, one), {})),
            in_rows,
            share,
            self.allocation,
            self.search,
        )
        edit = zeroed(job.model, lambda group, score: self._gone(shares.of_layer[group.layer], score))
        found, notes = swept(run, groups, self.calibration, squares, edit)
        if self.variant:
            found["alpha"] = {name: facts["alpha"] for name, facts in notes.items()}
        return job.note("wanda", **found, **shares.facts)

    def _gone(self, share: float, score: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """Which entries become zero [out, in], and the variant's alpha."""
        if self.pattern is not None:
            return lowest_in_groups(score, *parse_pattern(self.pattern)), {}
        if not self.variant:
            return lowest_in_rows(score, share), {}
        mask, alpha = lowest_mass(score, share)
        return mask, {"alpha": alpha}
