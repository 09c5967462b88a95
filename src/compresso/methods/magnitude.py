"""Unstructured magnitude pruning: the smallest weights become zero (Han et al., arXiv 1506.02626, without the
retraining).

The baseline of every one-shot paper. Weights compare within a matrix (as in SparseGPT's and Wanda's papers), within an
output row, or over all matrices of the model at once. Needs no data.

Departures: exactly floor(share * entries) leave, the first ones among equals; Wanda's public code takes one more and
every tie (`compat: reference`). n:m means n kept, while that code's `prune_n` counts those removed.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.sparsity import at_most_threshold, lowest_in_groups, lowest_in_rows, lowest_share, parse_pattern
from compresso.job import Job
from compresso.stage import Effects, Passes, stage
from compresso.sweep.audit import audit, fingerprints
from compresso.sweep.compressed import Compressed, zeroed_weights
from compresso.sweep.finite import check_weights
from compresso.sweep.targets import Groups, Where, chosen, matrix, names_of


@stage(
    "magnitude",
    title="zeros the smallest weights",
    paper="1506.02626",
    effects=Effects.WEIGHTS,
    when="As the floor in comparisons of one-shot pruning; needs no data.",
    failures="Small weights on large inputs matter: quality falls early. Zeros stored dense save no bytes and no time.",
)
class Magnitude:
    """Knobs of magnitude pruning.

    Args:
        sparsity: share of weights that become zero; 0.5 if no pattern is given either.
        pattern: "n:m" instead: n of every m consecutive inputs are kept.
        scope: within what weights compare: "matrix", "row" or "global".
        compat: "exact" or "reference" (the public code's off-by-one and ties; of scope "matrix").
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
    """

    sparsity: Annotated[float, Ge(0), Lt(1)] | None = None
    pattern: str | None = None
    scope: Literal["matrix", "row", "global"] = "matrix"
    compat: Literal["exact", "reference"] = "exact"
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

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are pruned; needs shapes only. Raises RecipeError or ArchError."""
        return chosen(model, arch, self.where, parse_pattern(self.pattern)[1] if self.pattern else 1)

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it works on, and the share that becomes zero."""
        return zeroed_weights(model, self.check(model, arch), self.sparsity, self.pattern)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """None: it reads weights alone."""
        return []

    @torch.no_grad()
    def __call__(self, job: Job) -> Job:
        """Zero the smallest weights of every linear."""
        groups = self.check(job.model, job.arch)
        check_weights(job.model, groups)
        before, names = fingerprints(job.weights.tensors()), names_of(groups)
        weights = [matrix(job.model, name) for name in names]
        if self.scope == "global":
            together = torch.cat([weight.flatten() for weight in weights]).unsqueeze(0)
            masks = lowest_share(together.abs(), self._share).flatten().split([weight.numel() for weight in weights])
        else:
            masks = (self._gone(weight.float().abs()) for weight in weights)
        for weight, mask in zip(weights, masks, strict=True):
            weight.masked_fill_(mask.reshape(weight.shape), 0)
        return job.note("magnitude", **audit(job.weights.tensors(), before, names))

    @property
    def _share(self) -> float:
        return 0.5 if self.sparsity is None else self.sparsity

    def _gone(self, score: Tensor) -> Tensor:
        """Which entries of a matrix become zero [out, in]."""
        if self.pattern is not None:
            return lowest_in_groups(score, *parse_pattern(self.pattern))
        if self.compat == "reference":
            return at_most_threshold(score, self._share)
        return lowest_in_rows(score, self._share) if self.scope == "row" else lowest_share(score, self._share)
