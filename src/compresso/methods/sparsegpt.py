"""SparseGPT: weights leave by optimal brain surgeon scores, and those to their right make up for them (Frantar,
Alistarh, 2301.00774).

Section 3.1: the second moment H of a linear's inputs, damped by 1 % of its mean diagonal, inverted once for all rows.
Section 3.2: w^2 / U_jj^2 within all rows of 128 columns (unstructured), or n of every m inputs of a row (section 3.4,
n:m), chosen when the
    sweep gets there, so from compensated weights; `compresso.core.obs`.
Section 3.5, joint with quantization: `bits` rounds what is left to a grid of each row, fitted to the weights before
    anything is done; its error is compensated as well. A few small weights more round to zero.
Section 4, procedure: block after block, each calibrated on the outputs of the pruned blocks before it;
`compresso.sweep.sweep`.

Departures: n:m means n kept, while the authors' `prune_n` counts those removed. Exactly floor(share * entries) of a
block of columns leave; there, one more and every tie (`compat: reference`). q, k, v, and gate, up, share one second
moment and one factorisation: they read the same inputs. The last block is not run again. Where H cannot be factored,
damping grows tenfold up to three times, then in float64, then the run stops: never an identity in its place, but for an
expert that no calibration token chose, whose smallest weights go, which is said. An expert's second moment is that of
its own tokens; its gate and up are one matrix here, as they are stored. Routers stay as they are. Calibration rows are
the run's, not C4 by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.obs import Quantize
from compresso.core.rounding import fit
from compresso.core.sparsity import lowest_in_groups, lowest_in_rows, parse_pattern
from compresso.job import Job
from compresso.observe.folds import second_moment
from compresso.stage import Effects, Passes, search_passes, stage, sweep_passes
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed, rounded_weights, zeroed_weights
from compresso.sweep.one_shot import compensated, more_damped, obs_choice, zeroed
from compresso.sweep.share_search import searched_shares
from compresso.sweep.shares import ShareAllocation, ShareSearch, in_blocks
from compresso.sweep.swept import swept
from compresso.sweep.targets import Group, Groups, Where, chosen
from compresso.sweep.visitors import Edit


@stage(
    "sparsegpt",
    title="zeros the weights that cost least and lets those that stay make up for them",
    paper="2301.00774",
    effects=Effects.WEIGHTS,
    needs=("data",),
    when=(
        "The best of the one-shot methods from about half of the weights on, or with 2:4; jointly with rounding to few"
        " bits."
    ),
    failures=(
        "Zeros stored dense save no bytes and no time without a kernel for them. Little data: what is left fits that"
        " data alone."
    ),
    zeroes={},
)
class SparseGpt:
    """Knobs of SparseGPT.

    Args:
        sparsity: share of a matrix' weights that become zero; 0.5 if no pattern is given either.
        pattern: "n:m" instead: n of every m consecutive inputs are kept.
        bits: rounds what is left to a grid of 2^bits points a row; None rounds nothing. Stored as full numbers.
        damping: share of H's mean diagonal that is added to it.
        block: columns among which weights are chosen, and updated together.
        compat: "exact" or "reference" (the authors' off-by-one and ties).
        not_invertible: what becomes of linears whose second moment cannot be inverted: "stop" the run, or prune them by
            "wanda", which the records tell.
        allocation: of zeros to layers: "uniform", or found by search: "dp" or "evolve", of the same number in all.
        search: of allocations that are found; see `compresso.sweep.shares.ShareSearch`.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
        calibration: examples, batch, activations, true_sequential; see `compresso.sweep.calibration.Calibration`.
    """

    keeps_moments: ClassVar[bool] = True
    """Its statistic is a second moment, [in, in]."""

    sparsity: Annotated[float, Ge(0), Lt(1)] | None = None
    pattern: str | None = None
    bits: Annotated[int, Ge(2), Le(8)] | None = None
    damping: Annotated[float, Gt(0), Le(1)] = 0.01
    block: Annotated[int, Ge(1)] = 128
    compat: Literal["exact", "reference"] = "exact"
    not_invertible: Literal["stop", "wanda"] = "stop"
    allocation: ShareAllocation = ShareAllocation.UNIFORM
    search: ShareSearch = ShareSearch()
    where: Where = Where()
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other."""
        if self.pattern is not None:
            _, m = parse_pattern(self.pattern)
            if self.sparsity is not None:
                raise ValueError(f"pattern={self.pattern} says how many weights each row loses; set sparsity to null")
            if self.block % m:
                raise ValueError(f"block={self.block} is no multiple of {m}, which pattern={self.pattern} needs")
        if self.allocation != ShareAllocation.UNIFORM and (self.pattern is not None or self.compat != "exact"):
            raise ValueError(
                f"allocation={self.allocation} gives each layer an exact share; leave pattern out and set compat to"
                " exact"
            )
        if self.not_invertible == "wanda" and self.bits is not None:
            raise ValueError("not_invertible=wanda prunes and does not round; leave bits out, or let the run stop")

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are pruned; needs shapes only. Raises RecipeError or ArchError."""
        return chosen(model, arch, self.where, parse_pattern(self.pattern)[1] if self.pattern else 1, experts=True)

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it works on, the share that becomes zero, and the bits of the others if it rounds them."""
        groups = self.check(model, arch)
        found = zeroed_weights(model, groups, self.sparsity, self.pattern)
        if self.bits is None:
            return found
        return replace(found, bits=rounded_weights(model, groups, self.bits, 0, symmetric=False).bits)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the sweep, and those of the search for shares."""
        return [sweep_passes(self, model, arch), *search_passes(self, model, arch, self.calibration.examples)]

    def __call__(self, job: Job) -> Job:
        """Sweep over the blocks."""
        groups, run = self.check(job.model, job.arch), job.sweeping("sparsegpt", self)
        share = 0.5 if self.sparsity is None else self.sparsity
        if share == 0 and self.pattern is None and self.bits is None:
            return job.note("sparsegpt", sparsity=0.0)
        shares = searched_shares(
            run,
            groups,
            self.calibration,
            second_moment,
            lambda one: self._edit(job.model, dict.fromkeys(groups, one)),
            in_blocks(self.block),
            share,
            self.allocation,
            self.search,
        )
        edit = self._edit(job.model, shares.of_layer)
        found, notes = swept(run, groups, self.calibration, second_moment, edit)
        return job.note("sparsegpt", **found, **shares.facts).note(
            "sparsegpt",
            bits=self.bits,
            loss={name: facts["loss"] for name, facts in notes.items()},
            damped_more=more_damped(notes, self.damping),
            by_wanda={name: facts["not_inverted"] for name, facts in notes.items() if "not_inverted" in facts},
        )

    def _edit(self, model: PreTrainedModel, shares: Mapping[int, float]) -> Edit:
        """The edit of groups whose layers lose these shares."""
        pattern = parse_pattern(self.pattern) if self.pattern else None

        def by_wanda(group: Group, score: Tensor) -> tuple[Tensor, dict[str, Any]]:
            """Entries that go by Wanda's score."""
            return lowest_in_groups(score, *pattern) if pattern else lowest_in_rows(score, shares[group.layer]), {}

        return compensated(
            model,
            choose=lambda group, scores: obs_choice(shares[group.layer], pattern, self.compat)(group, scores),
            every=pattern[1] if pattern else self.block,
            quantize=None if self.bits is None else self._rounding,
            damping=self.damping,
            block=self.block,
            otherwise=zeroed(model, by_wanda) if self.not_invertible == "wanda" else None,
        )

    def _rounding(self, weight: Tensor, _: Tensor) -> Quantize:
        """How a column is rounded: to the grids of the rows as they were."""
        assert self.bits is not None
        grid = fit(weight, self.bits)
        return lambda left, j: grid.round(left[:, :1], j).squeeze(1)
