"""Unstructured magnitude pruning: the smallest weights become zero (Han et al., arXiv 1506.02626, without the
retraining).

The baseline of every one-shot paper. Weights compare within a matrix (as in SparseGPT's and Wanda's papers), within an
output row, or over all matrices of the model at once. Needs no data.

Departures: exactly floor(share * entries) leave, the first ones among equals; Wanda's public code takes one more and
every tie (`compat: reference`). n:m means n kept, while that code's `prune_n` counts those removed.
An expert's gate and up are one matrix here, as they are stored; routers stay as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.sparsity import at_most_threshold, lowest_in_groups, lowest_in_rows, lowest_share, parse_pattern
from compresso.job import Job
from compresso.observe.folds import Stats
from compresso.stage import Effects, Passes, search_passes, stage
from compresso.sweep.audit import audit, fingerprints
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed, zeroed_weights
from compresso.sweep.finite import check_weights
from compresso.sweep.share_search import NOTHING_SEEN, searched_shares
from compresso.sweep.shares import ShareAllocation, ShareSearch, in_matrix, in_rows
from compresso.sweep.targets import Group, Groups, Where, chosen, matrix, names_of
from compresso.sweep.visitors import Edit


@stage(
    "magnitude",
    title="zeros the smallest weights",
    paper="1506.02626",
    effects=Effects.WEIGHTS,
    when="As the floor in comparisons of one-shot pruning; needs no data.",
    failures="Small weights on large inputs matter: quality falls early. Zeros stored dense save no bytes and no time.",
    zeroes={},
)
class Magnitude:
    """Knobs of magnitude pruning.

    Args:
        sparsity: share of weights that become zero; 0.5 if no pattern is given either.
        pattern: "n:m" instead: n of every m consecutive inputs are kept.
        scope: within what weights compare: "matrix", "row" or "global".
        compat: "exact" or "reference" (the public code's off-by-one and ties; of scope "matrix").
        allocation: of zeros to layers: "uniform", or found by search: "dp" or "evolve", of the same number in all; a
            search needs data.
        search: of allocations that are found; see `compresso.sweep.shares.ShareSearch`.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
    """

    sparsity: Annotated[float, Ge(0), Lt(1)] | None = None
    pattern: str | None = None
    scope: Literal["matrix", "row", "global"] = "matrix"
    compat: Literal["exact", "reference"] = "exact"
    allocation: ShareAllocation = ShareAllocation.UNIFORM
    search: ShareSearch = ShareSearch()
    where: Where = Where()

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other."""
        if self.pattern is not None:
            parse_pattern(self.pattern)
            if self.sparsity is not None or self.scope == "global":
                raise ValueError(
                    f"pattern={self.pattern} says how many weights each row loses; set sparsity to null and scope to"
                    " matrix"
                )
        if self.compat == "reference" and (self.scope != "matrix" or self.pattern is not None):
            raise ValueError("compat=reference is about a share of each matrix; leave pattern out and scope at matrix")
        if self.allocation != ShareAllocation.UNIFORM and (
            self.pattern is not None or self.scope == "global" or self.compat != "exact"
        ):
            raise ValueError(
                f"allocation={self.allocation} gives each layer an exact share; leave pattern out, set scope to matrix"
                " or row, and compat to exact"
            )

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are pruned; needs shapes only. Raises RecipeError or ArchError."""
        return chosen(model, arch, self.where, parse_pattern(self.pattern)[1] if self.pattern else 1, experts=True)

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it works on, and the share that becomes zero."""
        return zeroed_weights(model, self.check(model, arch), self.sparsity, self.pattern)

    def needs_more(self) -> tuple[str, ...]:
        """Data, where a search compares models."""
        return () if self.allocation == ShareAllocation.UNIFORM else ("data",)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """Those of a search for shares: else it reads weights alone."""
        return search_passes(self, model, arch)

    @torch.no_grad()
    def __call__(self, job: Job) -> Job:
        """Zero the smallest weights of every linear."""
        groups = self.check(job.model, job.arch)
        check_weights(job.model, groups)
        before, names = fingerprints(job.weights.tensors()), names_of(groups)
        if self.scope == "global":
            weights = [matrix(job.model, name) for name in names]
            together = torch.cat([weight.flatten() for weight in weights]).unsqueeze(0)
            masks = lowest_share(together.abs(), self._share).flatten().split([weight.numel() for weight in weights])
            for weight, mask in zip(weights, masks, strict=True):
                weight.masked_fill_(mask.reshape(weight.shape), 0)
            return job.note("magnitude", **audit(job.weights.tensors(), before, names))
        shares = searched_shares(
            job.sweeping("magnitude", self),
            groups,
            Calibration(),
            None,
            lambda share: self._edit(job.model, dict.fromkeys(groups, share)),
            in_rows if self.scope == "row" else in_matrix,
            self._share,
            self.allocation,
            self.search,
        )
        edit = self._edit(job.model, shares.of_layer)
        for group in (group for here in groups.values() for group in here):
            edit(group, NOTHING_SEEN)
        return job.note("magnitude", **audit(job.weights.tensors(), before, names), **shares.facts)

    def _edit(self, model: PreTrainedModel, shares: Mapping[int, float]) -> Edit:
        """The edit of groups whose layers lose these shares; it looks at no statistic."""

        def edit(group: Group, _: Stats) -> Mapping[str, Any]:
            for name in group.names:
                weight = matrix(model, name)
                weight.masked_fill_(self._gone(weight.float().abs(), shares[group.layer]), 0)
            return {}

        return edit

    @property
    def _share(self) -> float:
        return 0.5 if self.sparsity is None else self.sparsity

    def _gone(self, score: Tensor, share: float) -> Tensor:
        """Which entries of a matrix become zero [out, in]."""
        if self.pattern is not None:
            return lowest_in_groups(score, *parse_pattern(self.pattern))
        if self.compat == "reference":
            return at_most_threshold(score, share)
        return lowest_in_rows(score, share) if self.scope == "row" else lowest_share(score, share)
